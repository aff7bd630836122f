"""What an Open asks of a session that may be there already: in memory, or in the store alone."""

from collections.abc import Container
from dataclasses import dataclass

from carousel_protos.v1.manifest_pb2 import Policy
from carousel_server.engine.policy import Blocking
from carousel_server.errors import FencedError, SessionDiffersError, shorten


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """`carousel.v1.Open` says what each field is; `owner` is who asks."""

    session_id: str
    owner: str = ""
    model: str = ""
    version: str = ""
    policy: Policy | None = None
    resume: bool = False
    holder: str = ""
    epoch: int | None = None

    def takes_up(self, holder: str) -> bool:
        """Whether the session that `holder` has is to be taken up; or else a new one is asked for.

        Raises `FencedError` where `epoch` says that the asker had it, and another has it now.
        """
        if self.holder and self.holder == holder:
            return True
        if self.epoch is not None:
            raise FencedError(f"another client has resumed session {self.session_id}; resume it anew to take it back")
        return self.resume

    def check_same(self, model: str, version: str, blocking: Blocking, former: Container[str]) -> None:
        """Raise `SessionDiffersError` where this names another model, version or policy than the session has.

        `former`: the versions whose sessions went to its own.
        """
        if self.model not in ("", model) or (self.version not in ("", version) and self.version not in former):
            raise SessionDiffersError(
                f"session {self.session_id} is on version {version} of {model}, not on {shorten(self.version)} of "
                f"{shorten(self.model)}; resume it as it is, or open a new one"
            )
        if self.policy is not None and self.policy.kind not in (0, blocking.kind):
            raise SessionDiffersError(f"session {self.session_id} runs under {blocking}; leave policy out")
