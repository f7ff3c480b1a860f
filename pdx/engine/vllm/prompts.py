"""What pdx reads from a vLLM request: its handle and the names of its prompt's blocks. Client input: trust nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdx.errors import HandleError, Refused
from pdx.handoff.handle import TransferHandle, peek
from pdx.keys import tail_hash

if TYPE_CHECKING:
    from vllm.v1.request import Request

SEND_FLAG, LOAD_FLAG, HANDLE_KEY = "do_remote_decode", "do_remote_prefill", "pdx_handle"
TOKENS_KEY = "pdx_tokens"  # the handoff covers so many of the prompt's tokens; behind them comes what prefill generated
EARLY_KEY = "pdx_early"  # the request came beside prefill's, not after its reply


@dataclass(frozen=True)
class Prompt:
    """What a handoff covers of one request's prompt, as the daemon wants to know it.

    `handle` is not verified here: the daemon does that.
    """

    text: str
    handle: TransferHandle
    tokens: int
    block_hashes: list[bytes]
    tail_hash: bytes
    early: bool

    @property
    def blocks(self) -> int:
        return len(self.block_hashes) + bool(self.tail_hash)


def asks_for(request: Request, flag: str) -> bool:
    parameters = request.kv_transfer_params
    return isinstance(parameters, dict) and bool(parameters.get(flag)) and HANDLE_KEY in parameters


def read(request: Request, *, block_tokens: int) -> Prompt:
    """Raises Refused for prompts that pdx does not carry, HandleError for what is no handle."""
    parameters = request.kv_transfer_params
    assert parameters is not None
    text = parameters[HANDLE_KEY]
    if not isinstance(text, str):
        raise HandleError("handle is not text")
    tokens = request.prompt_token_ids
    if tokens is None or request.mm_features or request.lora_request is not None:
        # A tail is named by its tokens, which say nothing of images, embeddings or adapters.
        raise Refused("only plain token prompts without adapters are handed over")
    covered = _covered(parameters.get(TOKENS_KEY, len(tokens)), len(tokens))
    full_blocks = covered // block_tokens
    hashes = [bytes(block_hash) for block_hash in request.block_hashes[:full_blocks]]
    if len(hashes) != full_blocks:
        raise Refused(f"{len(hashes)} block hashes for {covered} prompt tokens")
    tail = tail_hash(hashes[-1] if hashes else b"", list(tokens[full_blocks * block_tokens : covered]))
    return Prompt(text, peek(text), covered, hashes, tail, early=parameters.get(EARLY_KEY) is True)


def _covered(tokens: Any, prompt_tokens: int) -> int:
    if type(tokens) is not int or not 1 <= tokens <= prompt_tokens:  # True is an int, and no count
        raise Refused(f"{TOKENS_KEY} must be a number from 1 to the prompt's {prompt_tokens}")
    return tokens
