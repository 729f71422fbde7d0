"""Text as it comes, each piece marked with where its token came from.

    python examples/stream.py BUNDLE [PROMPT]

Accepted drafts are printed in [brackets], the target's own tokens without.
"""

from __future__ import annotations

import sys

from mtp_runtime import MtpError, Session

PROMPT = 'def add(a, b):\n    """'


def main(bundle: str, prompt: str = PROMPT) -> None:
    with Session.open(bundle) as session:
        # Ends at a stop id of the bundle, at a blank line or after 64 tokens, whatever is first.
        generation = session.generate(prompt, max_new_tokens=64, stop="\n\n\n")
        print(prompt, end="")
        for token, text in generation.with_text():
            print(f"[{text}]" if token.origin == "accepted" and text else text, end="", flush=True)
        stats = generation.stats
        print(f"\n\nended by: {generation.finish_reason}")
        print(f"{stats.committed_tokens} tokens, {stats.accepted} of {stats.drafted} drafts accepted")
        print(f"{stats.committed_per_round:.2f} tokens per round, {stats.tokens_per_second:.0f} tokens per second")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except MtpError as error:
        sys.exit(f"error: {error}")
