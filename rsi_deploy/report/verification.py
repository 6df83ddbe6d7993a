"""The result of `verify`."""

from typing import Literal

import pydantic

Status = Literal["holds", "broken", "not checked"]


class Claim(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A claim of the report, and the result of computing it again."""

    name: str
    status: Status
    detail: str


class VerifyResult(pydantic.BaseModel, frozen=True, extra="forbid"):
    """All claims of a bundle."""

    bundle: str
    claims: tuple[Claim, ...]

    @property
    def ok(self) -> bool:
        """Return whether no claim is broken."""
        return all(claim.status != "broken" for claim in self.claims)
