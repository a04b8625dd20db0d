"""Every field that other servers take is served, or refused with what to use instead."""

import pytest

from gateway.api.chat import ChatRequest
from gateway.api.completions import CompletionRequest
from gateway.api.schemas.parsing import UNSUPPORTED, parse
from opticnerve.errors import UnsupportedFeature
from tests.bodies import body

# Fields of ChatCompletionRequest and CompletionRequest of vLLM at 002032ee and SGLang at 004c82e0,
# and the names of earlier releases that clients still send.
BOTH = """
    model frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream
    stream_options temperature top_p user response_format top_k min_p repetition_penalty
    stop_token_ids ignore_eos min_tokens skip_special_tokens cache_salt priority session_id
"""
OF_VLLM = """
    use_beam_search watermarking length_penalty include_stop_str_in_output
    spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs
    logprob_token_ids allowed_token_ids bad_words echo add_special_tokens structured_outputs
    request_id return_tokens_as_token_ids return_token_ids routed_experts_prompt_start
    return_token_offsets return_mm_kwargs kv_transfer_params ec_transfer_params vllm_xargs
    repetition_detection thinking_token_budget stream_interval best_of early_stopping
    guided_json guided_regex guided_choice guided_grammar logits_processors
"""
OF_SGLANG = """
    return_hidden_states return_routed_experts routed_experts_start_len
    return_cached_tokens_details return_token_ids regex ebnf stop_regex no_stop_trim lora_path
    session_params custom_params custom_logit_processor images_config bootstrap_host bootstrap_port
    bootstrap_room routed_dp_rank disagg_prefill_dp_rank data_parallel_rank rid extra_key
    ngram_corpus_id
"""
CHAT = """
    messages top_logprobs max_completion_tokens tools tool_choice reasoning_effort
    include_reasoning parallel_tool_calls add_generation_prompt continue_final_message documents
    chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs return_prompt_text
    return_prompt_token_ids return_meta_info task separate_reasoning stream_reasoning
    max_dynamic_patch min_dynamic_patch use_audio_in_video input_ids reasoning
"""
COMPLETION = "prompt suffix prompt_embeds json_schema custom_labels"
SHARED = f"{BOTH} {OF_VLLM} {OF_SGLANG}".split()


@pytest.mark.parametrize("name", [*SHARED, *CHAT.split()])
def test_fields_of_chats(name):
    assert name in ChatRequest.model_fields or UNSUPPORTED[name].instead


@pytest.mark.parametrize("name", [*SHARED, *COMPLETION.split()])
def test_fields_of_completions(name):
    unserved = {**UNSUPPORTED, **CompletionRequest.unsupported}
    assert name in CompletionRequest.model_fields or unserved[name].instead


@pytest.mark.parametrize("name", sorted(UNSUPPORTED.keys() - ChatRequest.model_fields.keys()))
def test_what_asks_for_something_is_refused_with_advice(name):
    with pytest.raises(UnsupportedFeature) as caught:
        parse(ChatRequest, body(**{name: {"x": 1}}))
    assert caught.value.param == name
    assert caught.value.message.endswith(
        f"not supported by this server; {UNSUPPORTED[name].instead}"
    )
