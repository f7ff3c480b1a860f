"""What pdx reads from a vLLM request: its handle and the names of its prompt's blocks. Client input: trust nothing."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdx.errors import HandleError, Refused
from pdx.handoff.handle import peek
from pdx.keys import private_salt, salted, tail_hash, tenant_of
from pdx.wire import Budgets

if TYPE_CHECKING:
    from vllm.v1.request import Request

SEND_FLAG, LOAD_FLAG, HANDLE_KEY = "do_remote_decode", "do_remote_prefill", "pdx_handle"
TOKENS_KEY = "pdx_tokens"  # the handoff covers so many of the prompt's tokens; behind them comes what prefill generated
EARLY_KEY = "pdx_early"  # the request came beside prefill's, not after its reply
ID_BYTES = 16
LOAD_S = 15.0  # for what a look-up has found: it is here, or on its way from a disk


@dataclass(frozen=True)
class Prompt:
    """What a handoff, a look-up or an offer covers of one request, as the daemon wants to know it.

    `handle` is the text of one that is not verified here (the daemon does that); empty: there is none.
    """

    handle: str
    handoff_id: bytes
    budgets: Budgets
    tokens: int
    block_hashes: list[bytes]
    tail_hash: bytes = b""
    early: bool = False
    origin: bytes = b""  # of an offer: the handoff by which its request came
    first: int = 0  # block of the request with which `block_hashes` begins
    tenant: bytes = b""
    salt: bytes = b""  # of its adapter, which is in `block_hashes` and `tail_hash`

    @property
    def blocks(self) -> int:
        return len(self.block_hashes) + bool(self.tail_hash)


def new_id() -> bytes:
    """For a load or an offer that has no handle."""
    return secrets.token_bytes(ID_BYTES)


def blocks_of(
    request: Request,
    *,
    salt: bytes,
    block_tokens: int,
    first: int = 0,
    tokens: int | None = None,
    origin: bytes = b"",
) -> Prompt | None:
    """The full blocks of a request, from block `first` on and of its first `tokens` tokens (None: those of its prompt).

    None if there are none. Their hashes name all that went into them; of an adapter they name the place, where tomorrow
    there may be another one: hence its `salt`. Of an image they have the name that vLLM, or the client, has given it,
    which another image may have in another engine: so what comes from the first image on is not meant here.
    """
    covered = request.num_prompt_tokens if tokens is None else tokens
    covered = min([covered, *(feature.mm_position.offset for feature in request.mm_features or ())])
    hashes = [salted(block_hash, salt) for block_hash in request.block_hashes[first : covered // block_tokens]]
    if not hashes:
        return None
    end = (first + len(hashes)) * block_tokens
    tenant, budgets = tenant_of(request.cache_salt or ""), Budgets(total_s=LOAD_S)
    return Prompt("", new_id(), budgets, end, hashes, origin=origin, first=first, tenant=tenant, salt=salt)


def asks_for(request: Request, flag: str) -> bool:
    parameters = request.kv_transfer_params
    return isinstance(parameters, dict) and bool(parameters.get(flag)) and HANDLE_KEY in parameters


def read(request: Request, *, salt: bytes, block_tokens: int, shared: bool = True) -> Prompt:
    """`salt`: its adapter's. Raises Refused for prompts that pdx does not carry, HandleError for what is no handle.

    Without `shared` the names are those of this handoff alone.
    """
    parameters = request.kv_transfer_params
    assert parameters is not None
    text = parameters[HANDLE_KEY]
    if not isinstance(text, str):
        raise HandleError("handle is not text")
    tokens = request.prompt_token_ids
    if tokens is None or request.prompt_embeds is not None or request.mm_features:
        # A tail is named by its tokens, which say nothing of images, or of embeddings in the place of some.
        raise Refused("only plain token prompts are handed over")
    handle = peek(text)
    covered = _covered(parameters.get(TOKENS_KEY, len(tokens)), len(tokens))
    named = salt if shared else private_salt(handle.handoff_id, salt)
    full_blocks = covered // block_tokens
    hashes = [salted(block_hash, named) for block_hash in request.block_hashes[:full_blocks]]
    if len(hashes) != full_blocks:
        raise Refused(f"{len(hashes)} block hashes for {covered} prompt tokens")
    tail = tail_hash(hashes[-1] if hashes else named, list(tokens[full_blocks * block_tokens : covered]))
    early = parameters.get(EARLY_KEY) is True
    tenant = tenant_of(request.cache_salt or "")
    return Prompt(text, handle.handoff_id, handle.budgets, covered, hashes, tail, early, tenant=tenant, salt=salt)


def _covered(tokens: Any, prompt_tokens: int) -> int:
    if type(tokens) is not int or not 1 <= tokens <= prompt_tokens:  # True is an int, and no count
        raise Refused(f"{TOKENS_KEY} must be a number from 1 to the prompt's {prompt_tokens}")
    return tokens
