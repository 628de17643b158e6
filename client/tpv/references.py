"""References to what a user created: `[namespace/]name`, `name:3`, `name@alias`, a UUID, or a fingerprint."""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass

from tpv.errors import InvalidReference

DEFAULT_NAMESPACE = "default"
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,127}$"
NAME_HELP = "1 to 128 of a-z 0-9 . _ -, beginning with a letter or digit"

_NAME = re.compile(NAME_PATTERN)
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_RESERVED_ALIAS = re.compile(r"^(latest|newest|v?\d+)$")


@dataclass(frozen=True)
class Reference:
    """One thing in the registry, by name (with a version or an alias) or by id or fingerprint.

    >>> str(Reference.parse("mnli@best"))
    'default/mnli@best'
    """

    namespace: str = DEFAULT_NAMESPACE
    name: str | None = None
    version: int | None = None
    alias: str | None = None
    id: uuid.UUID | None = None
    fingerprint: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Reads a reference; raises InvalidReference saying what is wrong with it."""
        if text.startswith("sha256:"):
            if not re.fullmatch(r"sha256:[0-9a-f]{64}", text):
                raise InvalidReference(f"{text!r}: a fingerprint is sha256: and 64 hexadecimal digits")
            return cls(fingerprint=text)
        if _ID.fullmatch(text):
            return cls(id=uuid.UUID(text))
        return cls._parse_name(text)

    @classmethod
    def _parse_name(cls, text: str) -> Reference:
        namespace, slash, rest = text.partition("/")
        if not slash:
            namespace, rest = DEFAULT_NAMESPACE, text
        name, separator, selector = re.match(r"^([^:@]*)([:@]?)(.*)$", rest, re.DOTALL).groups()  # type: ignore[union-attr] # matches any text
        check_name(namespace, "namespace")
        check_name(name, "name")
        if separator == ":":
            if not re.fullmatch(r"[1-9]\d{0,8}", selector):
                raise InvalidReference(f"{text!r}: the version after ':' is a number from 1 on")
            return cls(namespace, name, version=int(selector))
        if separator == "@":
            check_alias(selector)
            return cls(namespace, name, alias=selector)
        return cls(namespace, name)

    @property
    def path(self) -> str:
        """`namespace/name`, as it stands in a URL."""
        return f"{self.namespace}/{self.name}"

    @property
    def selector(self) -> str | None:
        """`{v}` of a URL: the version's number or `@alias`; None for the newest."""
        if self.version is not None:
            return str(self.version)
        return f"@{self.alias}" if self.alias else None

    def __str__(self) -> str:
        if self.id or self.fingerprint:
            return str(self.id or self.fingerprint)
        suffix = f":{self.version}" if self.version is not None else f"@{self.alias}" if self.alias else ""
        return self.path + suffix


def check_name(text: str, what: str = "name") -> str:
    """Gives a valid name back; raises InvalidReference otherwise."""
    if not _NAME.fullmatch(text):
        raise InvalidReference(f"{text!r} is no {what}: use {NAME_HELP}")
    return text


def check_alias(text: str) -> str:
    """Gives a valid alias back; raises InvalidReference for other text and for words that mean a version already."""
    if not _NAME.fullmatch(text):
        raise InvalidReference(f"{text!r} is no alias: use {NAME_HELP}")
    if _RESERVED_ALIAS.fullmatch(text):
        raise InvalidReference(f"{text!r} cannot be an alias: it reads like a version; name the version itself instead")
    return text
