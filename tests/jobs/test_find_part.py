"""`--part`: as the user says, or of the launcher; what no launcher says is one line."""

import http.server
import threading

import pytest

from cv2jax.config import UserError
from cv2jax.jobs.parts import choose_part, find_part

NAMES = (
    "SLURM_PROCID SLURM_NTASKS SLURM_ARRAY_TASK_ID OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE TPU_PROCESS_ADDRESSES "
    "TPU_WORKER_HOSTNAMES TPU_WORKER_ID CV2JAX_DISTRIBUTED GCE_METADATA_IP MEGASCALE_NUM_SLICES MEGASCALE_SLICE_ID"
)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in NAMES.split():
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, "1/1"),
        ({"SLURM_PROCID": "7", "SLURM_NTASKS": "8"}, "8/8"),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, "3/4"),
        ({"TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}, "4/4"),
        ({"TPU_WORKER_ID": "1", "TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "localhost"}, "2/2"),
        (
            {
                "TPU_WORKER_ID": "1",
                "TPU_WORKER_HOSTNAMES": "a,b",
                "MEGASCALE_NUM_SLICES": "3",
                "MEGASCALE_SLICE_ID": "2",
            },
            "6/6",
        ),
    ],
)
def test_auto_is_the_number_that_the_launcher_gave(monkeypatch, environment, part):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(find_part("auto")) == part
    assert str(find_part("2/5")) == "2/5"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "no launcher"),
        ({"CV2JAX_DISTRIBUTED": "1", "GCE_METADATA_IP": "127.0.0.1:9"}, "no launcher"),
        ({"SLURM_PROCID": "8", "SLURM_NTASKS": "8"}, "the launcher says process 8 of 8"),
        ({"SLURM_PROCID": "one", "SLURM_NTASKS": "8"}, "the launcher says process one of 8"),
        ({"TPU_WORKER_ID": "x", "TPU_WORKER_HOSTNAMES": "a"}, "worker x of slice 0 of 1"),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, "SLURM_ARRAY_TASK_ID [+] 1"),
    ],
)
def test_where_no_launcher_says_it_the_error_says_what_to_give(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        find_part("auto")


def test_a_tpu_vm_is_asked_for_its_metadata(monkeypatch):
    attributes = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2",
        "tpu-env": "TYPE: 'V5E'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n",
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = attributes.get(self.path.rpartition("/")[2])
            asked_well = self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if found and asked_well else 404)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_):
            return None

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        monkeypatch.setenv("CV2JAX_DISTRIBUTED", "1")
        assert str(find_part("auto")) == "4/4"
        del attributes["tpu-env"]  # of one slice
        assert str(find_part("auto")) == "2/2"
        del attributes["agent-worker-number"]
        with pytest.raises(UserError, match="no launcher"):
            find_part("auto")
        server.shutdown()


def test_part_and_merge_are_two_commands():
    assert choose_part(None, True) is None
    assert str(choose_part("1/2", False)) == "1/2"
    with pytest.raises(UserError, match="first run every part, then --merge"):
        choose_part("1/2", True)
