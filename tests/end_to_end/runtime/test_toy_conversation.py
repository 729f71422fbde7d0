"""What holds of sessions without graphs holds of LiteRT on the toy pair: the same tests, with its `open_session`."""

from tests.unit.runtime.test_conversation import *  # noqa: F403
