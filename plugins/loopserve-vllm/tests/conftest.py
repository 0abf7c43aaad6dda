"""vLLM has an environment of its own (`make test-vllm`); elsewhere these tests are not collected."""

import os
from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # so that tests see the model runner
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_CPU_CI_ENV="1",
    HF_HUB_OFFLINE="1",
)
