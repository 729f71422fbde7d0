"""A chat of six turns and a tool call in stock LiteRT-LM, drafts off and on; nothing of this project is imported.

python examples/litert_lm_chat.py BUNDLE.litertlm
"""

import json
import sys

import litert_lm


def engine(path: str, drafts: bool) -> litert_lm.Engine:
    options = {"backend": litert_lm.Backend.CPU(thread_count=2), "cache_dir": ":nocache", "max_num_tokens": 1000}
    if hasattr(litert_lm, "SpeculativeDecodingMode"):  # 0.19
        mode = litert_lm.SpeculativeDecodingMode.ON if drafts else litert_lm.SpeculativeDecodingMode.OFF
        return litert_lm.Engine(path, speculative_decoding_config=litert_lm.SpeculativeDecodingConfig(mode), **options)
    return litert_lm.Engine(path, enable_speculative_decoding=drafts, **options)


def add(a: int, b: int) -> int:
    """Add two whole numbers."""
    return a + b


WORDS = ("verb climb", "verb run", "verb swim", "noun river", "noun stone")
QUESTIONS = [*(f"What does the {word} mean?" for word in WORDS), "Thank you"]
replies: dict[bool, list[str]] = {False: [], True: []}
path = sys.argv[1] if len(sys.argv) == 2 else sys.exit("usage: python examples/litert_lm_chat.py BUNDLE.litertlm")
litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
for drafts in (False, True):
    with engine(path, drafts) as model:
        with model.create_conversation(tools=[add], automatic_tool_calling=False) as chat:
            call = chat.send_message("What is 231 plus 84?")["tool_calls"][0]["function"]
            replies[drafts].append(f"calls {json.dumps(call)}")
            answer = {"type": "tool_response", "name": call["name"], "response": add(**call["arguments"])}
            replies[drafts].append(chat.send_message({"role": "tool", "content": [answer]})["content"][0]["text"])
        with model.create_conversation() as chat:
            replies[drafts] += [chat.send_message(q)["content"][0]["text"] for q in QUESTIONS]
print(*replies[True], sep="\n")
sys.exit(None if replies[False] == replies[True] else f"drafts changed a reply: without, {replies[False]}")
