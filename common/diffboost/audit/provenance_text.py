"""What an audit of provenance found, in lines that a person reads."""

from collections.abc import Iterator, Sequence

from diffboost.audit.provenance import FileAudit
from diffboost.generation.provenance import FACTS


def describe(audits: Sequence[FileAudit]) -> Iterator[str]:
    """Lines that a person reads: a table of a single file's facts, else what all files share.

    Args:
        audits: of :func:`audit_provenance`.

    Source: engineering choice.
    """
    told = [audit.facts for audit in audits if audit.facts is not None]
    if told:
        values = {name: sorted({facts[name] for facts in told}) for name in FACTS}
        for name, found in values.items():
            value = str(found[0]) if len(found) == 1 else f"{len(found)} values"
            yield f"  {name:<20} {value}"
    for audit in audits:
        yield from (f"{audit.path}: {failure}" for failure in audit.failures)
    for what in dict.fromkeys(what for audit in audits for what in audit.verified):
        count = sum(what in audit.verified for audit in audits)
        yield f"verified, {what}: {count} of {len(audits)}"
    failed = sum(bool(audit.failures) for audit in audits)
    yield f"{len(audits) - failed} of {len(audits)} files hold what they say"
