"""A local stack that another process started, known by its state file alone: it stands in the way, or is stopped."""

from deploy.local.config import StackConfig
from deploy.local.interruption import uninterrupted
from deploy.local.java import Say
from deploy.local.records import stop_recorded
from deploy.local.state import StackState, StateError, forget_state, read_state


def refuse_second_stack(config: StackConfig) -> None:
    """Make sure that no stack runs on the state folder.

    Raises:
        StateError: one does; the message says how to stop it.
    """
    config.state_dir.mkdir(parents=True, exist_ok=True)
    state = read_state(config.state_dir)
    if state is None or not state.running:
        return
    remedy = (
        "stop it with 'sprout down', or use another folder (SPROUT_LOCAL_STATE)"
        if state.owner_pid is None
        else f"process {state.owner_pid} runs it in the foreground: stop that one first"
    )
    raise StateError(f"a stack runs on {config.state_dir} already ({len(state.running)} processes); {remedy}")


def stop_stack(state: StackState, *, say: Say = lambda _: None) -> int:
    """Stop a detached stack by its state file, the last started first.

    Returns:
        How many processes were running.

    Raises:
        StateError: it runs in the foreground of another process.
    """
    if state.owner_pid is not None and state.running:
        raise StateError(
            f"process {state.owner_pid} runs this stack in the foreground and stops it at its end; "
            "end that process (Ctrl-C), then everything stops"
        )
    with uninterrupted():
        stopped = stop_recorded(state.processes)
        for record in stopped:
            say(f"stopped {record.name}")
        forget_state(state.state_dir)
    return len(stopped)
