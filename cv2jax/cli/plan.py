"""Compile a stage for TPUs that are not here: does it fit, how fast can it run, what bounds it.

    cv2jax plan text_speech_lm_official --topology v5e:16x16 --batch_scale 16
    cv2jax plan flow_matching_official --topology 2xv5e-256 --batch_scale 32 --json plan.json --markdown plan.md
    cv2jax plan text_speech_lm_official --topology v5e:4x4 --fit
    cv2jax plan --matrix --out plans/

CONFIG may be several, or `all`: the five official stages. Without --corpus the batch is that of a stand-in whose
utterances last data.min_seconds to data.max_seconds; the longest rows are planned. A config that leaves its mesh open is
planned with the machine's preset, and the flags for that are told.

The step is compiled for real by libtpu (extra [aot] or [tpu], no TPU needed), which takes minutes at official size. FLOPs
and bytes are counted from the compiled program, loops as often as they run; the expected step time is the largest of what
arithmetic, memory and networks need at their published rates, were they to overlap perfectly. Activations are an upper
bound, from the traced step.

--fit tries meshes, rematerialisation and batch sizes, compiles the few that promise most, and tells the flags of the
fastest that fits. --matrix plans every official stage on five machines and weak scaling from 16 to 256 chips, a process
and a JSON file a cell in --out; started again it goes on where it stopped.

Exit codes: 0 it fits, 2 a mistake, 4 some stage does not fit (told by how much, and what to try).
"""

import pathlib

from absl import flags

from cv2jax.config import UserError

USAGE = "CONFIG... --topology v5e:16x16 [--slices N] [--set key=value]... [--fit] | --matrix --out DIR"
EXIT_DOES_NOT_FIT = 4


def define_flags(values: flags.FlagValues) -> None:
    """Declares this verb's flags."""
    define = flags
    define.DEFINE_string("topology", None, "slice: v5e:4x4, or a name such as v5p-128, 2xv5e-256", flag_values=values)
    define.DEFINE_integer("slices", 1, "slices joined by the data-centre network", lower_bound=1, flag_values=values)
    define.DEFINE_multi_string("set", [], "config override key=value; may be repeated", flag_values=values)
    define.DEFINE_string("corpus", None, "corpus whose lengths give the batch's shape", flag_values=values)
    define.DEFINE_float("batch_scale", 1.0, "global batch, times the config's", lower_bound=1e-6, flag_values=values)
    define.DEFINE_string("json", None, "file for the reports as JSON", flag_values=values)
    define.DEFINE_string("markdown", None, "file for the reports as a Markdown table", flag_values=values)
    define.DEFINE_boolean("fit", False, "search for the fastest plan that fits", flag_values=values)
    define.DEFINE_integer("compilations", 4, "that --fit may make a stage", lower_bound=1, flag_values=values)
    define.DEFINE_boolean("matrix", False, "all official stages on all machines", flag_values=values)
    define.DEFINE_string("out", None, "directory of --matrix", flag_values=values)


def main(args: list[str], values: flags.FlagValues) -> int:
    """Plans; returns the exit code."""
    if values.matrix:
        if args or values.topology or values.out is None:
            raise UserError(
                "--matrix plans all official stages on its own machines: give --out DIR, no CONFIG or --topology"
            )
        from cv2jax.jobs.plan import plan_matrix

        return 0 if plan_matrix(pathlib.Path(values.out)) else EXIT_DOES_NOT_FIT
    if not args:
        raise UserError(f"expected a CONFIG, several or all; usage: cv2jax plan {USAGE}")
    if values.topology is None:
        raise UserError("--topology is missing: give a slice such as v5e:4x4, or v5p-128")
    corpus = [] if values.corpus is None else [f"data.corpus={values.corpus}"]
    from cv2jax.jobs.plan import load_stages, plan

    fits = plan(
        load_stages(args, corpus + values.set),
        values.topology,
        num_slices=values.slices,
        batch_scale=values.batch_scale,
        fit=values.compilations if values.fit else 0,
        json_file=values.json,
        markdown_file=values.markdown,
    )
    return 0 if fits else EXIT_DOES_NOT_FIT
