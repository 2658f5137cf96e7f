"""The text-speech language model."""
