from rayserve_sarathi.text.token_bytes import read_token_bytes
from tests.tokenizers_for_tests import byte_fallback_tokenizer, byte_level_tokenizer, metaspace_tokenizer


def test_byte_level_tokens_are_bytes_and_added_ones_are_as_they_read():
    hf = byte_level_tokenizer()
    table = read_token_bytes(hf.backend_tokenizer).table

    assert {table[token_id] for token_id in hf.get_vocab().values()} >= {bytes([byte]) for byte in range(256)}
    assert table[hf.convert_tokens_to_ids("<think>")] == b"<think>"


def test_sentencepiece_tokens_are_bytes_or_text_with_spaces():
    hf = byte_fallback_tokenizer()
    token_bytes = read_token_bytes(hf.backend_tokenizer)

    assert token_bytes.table[hf.convert_tokens_to_ids("<0xE4>")] == b"\xe4"
    assert token_bytes.strips_first_space
    assert not any("\u2581".encode() in token for token in token_bytes.table)


def test_another_decoder_has_no_table():
    assert read_token_bytes(metaspace_tokenizer().backend_tokenizer) is None
