"""The parts of ``check_gpu.py``, a section each."""
