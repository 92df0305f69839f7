"""Ray's coloured tracebacks of several processes become the one line that says what happened."""

from ray.exceptions import RayTaskError

from ddpm_pipeline.cluster import cause_of, reason_line
from ddpm_pipeline.errors import UserError

TRACEBACK = (
    "\x1b[36mray::execute._setup_torch_process_group()\x1b[39m (pid=7, ip=10.0.0.3, actor_id=ab, repr=<Worker>)\n"
    '  File "/usr/lib/python3/site-packages/torch/distributed/c10d.py", line 83, in wrapper\n'
    "    return func(*args, **kwargs)\n"
    "torch.distributed.DistBackendError: NCCL error: unhandled system error"
)


def test_the_last_line_of_a_traceback_is_kept_without_colours() -> None:
    assert reason_line(RuntimeError(TRACEBACK)) == "DistBackendError: NCCL error: unhandled system error"


def test_the_cause_is_found_below_rays_wrapping() -> None:
    inner = UserError("gpus_per_worker: no GPU; set it to 0")
    wrapped = RayTaskError("work", "Traceback …", RayTaskError("inner", "Traceback …", inner))
    assert cause_of(wrapped) is inner
    assert reason_line(wrapped) == "gpus_per_worker: no GPU; set it to 0"
    assert cause_of(inner) is inner


def test_lines_of_a_message_are_joined_and_an_empty_one_gets_its_types_name() -> None:
    assert reason_line(RuntimeError("a worker died\nwhile joining")) == "a worker died while joining"
    assert reason_line(TimeoutError()) == "TimeoutError"


def test_a_very_long_line_ends_with_a_whole_word() -> None:
    line = reason_line(RuntimeError("word " * 1000))
    assert line.endswith("word …")
    assert len(line) < 650
