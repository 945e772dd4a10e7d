"""Small models of `transformers` and `peft` with random weights."""

# The packages need not be installed.
# pyright: reportMissingImports=false, reportUnknownVariableType=false, reportUnknownMemberType=false
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.entry import Case, entry

TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
DRY: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def tokens() -> Tensor:
    return torch.randint(2, 50, (2, 6))


def text(model: nn.Module, labels: Any = None) -> Case:
    """A batch of tokens, for a model that returns its own loss."""

    def batch() -> tuple[dict[str, Tensor]]:
        ids = tokens()
        return ({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids if labels is None else labels()},)

    return Case(model, batch, own_loss)


def own_loss(output: Any) -> Tensor:
    return output.loss


def classes() -> Tensor:
    return torch.randint(3, (2,))


@entry("transformers", "BERT, classifier")
def bert() -> Case:
    from transformers import BertConfig, BertForSequenceClassification

    return text(BertForSequenceClassification(BertConfig(**TEXT, **DRY, num_labels=3)), classes)


@entry("transformers", "RoBERTa, classifier")
def roberta() -> Case:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return text(RobertaForSequenceClassification(RobertaConfig(**TEXT, **DRY, num_labels=3)), classes)


@entry("transformers", "DistilBERT, classifier")
def distilbert() -> Case:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=50,
        dim=16,
        hidden_dim=32,
        n_layers=2,
        n_heads=2,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        num_labels=3,
    )
    return text(DistilBertForSequenceClassification(config), classes)


@entry("transformers", "ALBERT, classifier")
def albert() -> Case:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    return text(AlbertForSequenceClassification(AlbertConfig(**TEXT, embedding_size=8, classifier_dropout_prob=0.0, num_labels=3)), classes)


@entry("transformers", "ELECTRA, classifier")
def electra() -> Case:
    from transformers import ElectraConfig, ElectraForSequenceClassification

    return text(ElectraForSequenceClassification(ElectraConfig(**TEXT, **DRY, embedding_size=16, num_labels=3)), classes)


@entry("transformers", "DeBERTa v2, classifier", expected="refused")
def deberta() -> Case:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(**TEXT, **DRY, relative_attention=True, pos_att_type=["p2c", "c2p"], num_labels=3, pooler_hidden_size=16)
    return text(DebertaV2ForSequenceClassification(config), classes)


@entry("transformers", "DeBERTa v2, tokens")
def deberta_tokens() -> Case:
    from transformers import DebertaV2Config, DebertaV2ForTokenClassification

    config = DebertaV2Config(**TEXT, **DRY, relative_attention=True, pos_att_type=["p2c", "c2p"], num_labels=3)
    return text(DebertaV2ForTokenClassification(config), lambda: torch.randint(3, (2, 6)))


def gpt2_model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=None))


@entry("transformers", "GPT-2")
def gpt2() -> Case:
    return text(gpt2_model())


@entry("transformers", "GPT-2, gradient checkpointing")
def gpt2_checkpointing() -> Case:
    model: Any = gpt2_model()
    model.gradient_checkpointing_enable()
    return text(model)


@entry("transformers", "T5")
def t5() -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0)
    return text(T5ForConditionalGeneration(config))


@entry("transformers", "BART")
def bart() -> Case:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ffn = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    return text(
        BartForConditionalGeneration(BartConfig(vocab_size=50, d_model=16, max_position_embeddings=16, dropout=0.0, **sizes, **ffn))
    )


def causal(name: str, **options: Any) -> Case:
    """A decoder of the kind of Llama."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**TEXT, "num_key_value_heads": 1, "pad_token_id": 0, **options})
    return text(getattr(transformers, f"{name}ForCausalLM")(config))


@entry("transformers", "Llama")
def llama() -> Case:
    return causal("Llama")


@entry("transformers", "Llama, dynamic RoPE, beyond its length", expected="refused")
def llama_dynamic() -> Case:
    return causal("Llama", max_position_embeddings=4, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})


@entry("transformers", "Llama, gradient checkpointing")
def llama_checkpointing() -> Case:
    case = causal("Llama")
    model: Any = case.model
    model.gradient_checkpointing_enable()
    return case


@entry("transformers", "Mistral")
def mistral() -> Case:
    return causal("Mistral", sliding_window=4)


@entry("transformers", "Mixtral", expected="plain PyTorch fails")
def mixtral() -> Case:
    return causal("Mixtral", num_local_experts=2, num_experts_per_tok=1)


@entry("transformers", "Mixtral, eager experts", expected="refused")
def mixtral_eager() -> Case:
    return causal("Mixtral", num_local_experts=2, num_experts_per_tok=1, experts_implementation="eager")


@entry("transformers", "Qwen2")
def qwen2() -> Case:
    return causal("Qwen2")


@entry("transformers", "Gemma")
def gemma() -> Case:
    return causal("Gemma", head_dim=8)


@entry("transformers", "Phi")
def phi() -> Case:
    return causal("Phi", num_key_value_heads=2, resid_pdrop=0.0)


@entry("transformers", "GPT-NeoX")
def gpt_neox() -> Case:
    return causal("GPTNeoX")


@entry("transformers", "Mamba")
def mamba() -> Case:
    from transformers import MambaConfig, MambaForCausalLM

    return text(MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1)))


@entry("transformers", "ViT")
def vit() -> Case:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {key: value for key, value in TEXT.items() if key not in ("vocab_size", "max_position_embeddings")}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))
    return Case(model, lambda: ({"pixel_values": torch.randn(2, 3, 8, 8).double(), "labels": classes()},), own_loss)


def wav2vec2(**options: Any) -> Case:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    dry = dict.fromkeys(("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout"), 0.0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "classifier_proj_size": 8}
    front = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4}
    config = Wav2Vec2Config(**sizes, **dry, **front, num_conv_pos_embedding_groups=2, num_labels=3, **options)
    model = Wav2Vec2ForSequenceClassification(config)
    return Case(model, lambda: ({"input_values": torch.randn(2, 400).double(), "labels": classes()},), own_loss)


@entry("transformers", "Wav2Vec2, eval mode")
def wav2vec2_eval() -> Case:
    case = wav2vec2()
    case.model.eval()
    return case


@entry("transformers", "Wav2Vec2, train mode (SpecAugment and LayerDrop)", expected="refused")
def wav2vec2_train() -> Case:
    return wav2vec2(layerdrop=0.1, mask_time_length=2)


@entry("transformers", "Wav2Vec2, train mode without both")
def wav2vec2_train_plain() -> Case:
    return wav2vec2(layerdrop=0.0, apply_spec_augment=False)


def adapted(config: Any) -> Case:
    """GPT-2 with adapters; only these adapt."""
    from peft import get_peft_model

    return text(get_peft_model(gpt2_model(), config))


@entry("peft", "GPT-2 with LoRA")
def lora() -> Case:
    from peft import LoraConfig

    return adapted(LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False))


@entry("peft", "GPT-2 with LoRA (DoRA)")
def dora() -> Case:
    from peft import LoraConfig

    return adapted(LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True))


@entry("peft", "Llama with OFT")
def oft() -> Case:
    from peft import OFTConfig, get_peft_model

    config = OFTConfig(oft_block_size=8, r=0, target_modules=["q_proj", "v_proj"], init_weights=False)
    return text(get_peft_model(causal("Llama", num_key_value_heads=2).model, config))


@entry("peft", "GPT-2 with IA3")
def ia3() -> Case:
    from peft import IA3Config

    return adapted(IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], init_ia3_weights=False))


@entry("peft", "GPT-2 with prefix tuning")
def prefix() -> Case:
    from peft import PrefixTuningConfig

    return adapted(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
