"""What verify found, as one document."""

from typing import Literal

import pydantic

Status = Literal["holds", "broken", "not checked"]


class Claim(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One claim of the report: what was found when it was computed again."""

    name: str
    status: Status
    detail: str


class VerifyResult(pydantic.BaseModel, frozen=True, extra="forbid"):
    """All claims; `ok` when none is broken."""

    bundle: str
    claims: tuple[Claim, ...]

    @property
    def ok(self) -> bool:
        """Whether no claim is broken."""
        return all(claim.status != "broken" for claim in self.claims)
