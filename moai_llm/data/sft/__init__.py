"""Instruction data: records of any known shape to conversations, and conversations to tokens with the mask of what is
learned.
"""

from __future__ import annotations

from moai_llm.data.sft.detect import Detected, detect, read_conversations
from moai_llm.data.sft.encode import ChatOptions, Dropped, Encoded, encode_conversation, encode_record
from moai_llm.data.sft.messages import Messages
from moai_llm.data.sft.pairs import PAIR_COLUMNS, Pair, read_pairs
from moai_llm.data.sft.schemas import COLUMNS, SCHEMAS

__all__ = [
    "COLUMNS",
    "SCHEMAS",
    "ChatOptions",
    "Detected",
    "Dropped",
    "Encoded",
    "Messages",
    "PAIR_COLUMNS",
    "Pair",
    "detect",
    "encode_conversation",
    "encode_record",
    "read_conversations",
    "read_pairs",
]
