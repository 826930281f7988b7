"""Strings that break tokenizers and detokenizers."""

from __future__ import annotations

import random

HAND_WRITTEN = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\x00",
    "a\x00b\x00\x00c",
    "\x01\x02\x7f\x80\x9f\x1b[31mred\x1b[0m",
    "Hello, world!",
    " leading space",
    "   three leading spaces",
    "trailing space ",
    "trailing spaces   ",
    "double  spaces   and    more     of      them",
    " " * 64,
    " " * 63 + "x",
    "\n\n\n\n",
    "line one\r\nline two\r\n\r\nline four\rlone return\n",
    "\tindented\n\t\ttwice\n    spaces\n  \t mixed \t \n",
    "a\u00a0no-break\u2003em\u200bzero\u3000wide\ufeffbom\u2028line\u2029paragraph\x85next",
    "I'm you're he's we'll they'd I've don't 'Tis O'CLOCK I'M YOU'RE WE'LL",
    "1 12 123 1234 12345 123456 1234567 12345678901234567890",
    "   1  22   333    4444",
    "3.14159 -2.7e-10 1,000,000 0x1F 50% $9.99 1/2 ½ ²³ Ⅷ ٣٤ १२३ 一二三 ①②",
    "https://example.org:8080/a/b%20c?q=1&r=%E4%BD%A0#frag user@example.com",
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # comment\n\n\nclass A:\n\tpass\n',
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * c[i]; } // end",
    '{"key": [1, 2.5, null, true], "nested": {"s": "a\\"b\\\\c"}}',
    "SELECT * FROM t WHERE a <> 'x' AND b >= 10;",
    "<html><body class='x'>&amp;&lt;</body></html>",
    "👍👍🏽👍🏿 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 1️⃣ ❤️ ☕",
    "👩🏽‍🚀👨‍❤️‍💋‍👨🧑🏻‍🤝‍🧑🏿",
    "🙂" * 40,
    "e\u0301 é a\u0308\u0323\u0301 Z\u0351\u036b\u0343a\u0334\u0322l\u0335g\u0321o\u0336 ñ n\u0303",
    "ﬁ ﬂ Å Å Ω Ω ǆ ß ẞ İ ı",
    "你好，世界！今天天气怎么样？",
    "日本語のテキスト。カタカナ ひらがな 漢字",
    "한국어 텍스트 조합 \u1112\u1161\u11ab\u1100\u1173\u11af",
    "Привет, мир! Ещё раз: ёлка.",
    "Γειά σου Κόσμε",
    "שלום עולם מה שלומך",
    "مرحبا بالعالم ‏rtl mark‎ ltr",
    "नमस्ते दुनिया क्षत्रिय ज्ञान",
    "สวัสดีชาวโลก ภาษาไทย",
    "မင်္ဂလာပါ ខ្មែរ ლ ქართული հայերեն",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒜 𐍈 𠜎 𠜱 𝟙𝟚",
    "mixed English 中文 русский العربية 日本 🙂 end",
    "word" * 200,
    "x" * 1000,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "aaaaAAAAaaaa BBbbBB camelCaseWord snake_case_word SCREAMING_CASE kebab-case-word",
    "!!!???...---***///\\\\\\|||```~~~",
    "…—–«»“”‘’‚„†‡•‰′″‹›",
    "��� replacement characters \ufffd\ufffd",
    "\ud7ff\ue000\uf8ff\ufffe\uffff\U0010ffff",
    "<|endoftext|>",
    "<|im_start|>user\nhi<|im_end|>",
    "text <|im_end|> more<|im_end|>text",
    "<s>",
    "</s>",
    "a</s>b <s> c <unk>",
    "<unk>",
    "<|begin_of_text|>",
    "x<|eot_id|>y <|start_header_id|>user<|end_header_id|>\n\n",
    "<|im_start",
    "im_end|>",
    "<|im_end |>",
    "< s >",
    "<0x41>",
    "<0x0A><0xE4>",
    "▁▁ ▁word▁",
    "Ġword ĊčĠ",
    "[INST] <<SYS>>\nsystem\n<</SYS>>\n\nhello [/INST]",
    "<|user|>\nhi</s>\n<|assistant|>\n",
    "\\n \\u0041 \\x00 %s %d {0} ${x}",
    "a\n \n  \n   \nb",
    "end with newline\n",
    "end with crlf\r\n",
    " \n \t \r\n ",
    "foo \n bar\n\n  baz",
    "ends with emoji 🙂",
    "ends with half a flag 🇩",
    "\u200d\u200d\ufe0f\u20e3",
    "\u202eright to left override\u202c",
]

_ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    " \t\n\r\u00a0",
    ".,;:!?'\"()[]{}<>|/\\-_=+*&^%$#@~`",
    "äöüßéèñçøåæœÿ",
    "\u0300\u0301\u0308\u0323\u20dd\ufe0f\u200d",
    "абвгдежзийклмнопрстуфхцчшщъыьэюя",
    "的一是不了人我在有他这中大来上国",
    "のにはをたがでてとしれさ",
    "אבגדהוזחטיابتثجحخد",
    "🙂😂🤣👍🏽🇩🇪❤🚀🧑‍",
    "𝔘𐍈𠜎𝟙",
    "".join(map(chr, range(32))),
]
_FRAGMENTS = [
    " the",
    " and",
    "ing",
    "tion",
    "'s",
    "'LL",
    "  ",
    "\n\n",
    "\r\n",
    " 12",
    "<|im_end|>",
    "</s>",
    "http://",
]


def generated(count: int, seed: int) -> list[str]:
    """Random strings: runs of one script each, of length 1 to 12, and fragments between them."""
    rng = random.Random(seed)
    strings = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 14)):
            if rng.random() < 0.25:
                parts.append(rng.choice(_FRAGMENTS))
            else:
                alphabet = rng.choice(_ALPHABETS)
                parts.append("".join(rng.choices(alphabet, k=rng.randint(1, 12))))
        strings.append("".join(parts))
    return strings


def hard_strings() -> list[str]:
    """Three hundred, the same ones always."""
    return list(dict.fromkeys([*HAND_WRITTEN, *generated(300, seed=2)]))[:300]
