#!/usr/bin/env python3
"""A text that tokenizers stumble over.

    python tests/data/make/hostile.py tests/data/tokenizer/hostile.txt
"""
import random
import sys

random.seed(5)
parts = [
    "Plain words, then don't I'll WE'VE you're HE'D she'S it'm o'clock 'tis ''s 'ſ\n",
    "0 12 345 6789 12345678901234567890 3.14159 1,000,000 0x7fff ½ ² ٣٤٥ 七八 Ⅷ ৪৫৬\n",
    " leading\n  two\n   three\n\ttab\n\t\ttabs\n \t mixed \t \n\r\nCRLF line\r\nold mac\rend\n\n\n\n\n\n",
    "trailing spaces   \n" + " " * 33 + "x" + " " * 64 + "\n" + " " * 1000 + "y" + "\n" * 40 + "z" + "\t" * 50 + "w",
    "nbsp\u00a0em\u2003thin\u2009ideographic\u3000line\u2028para\u2029next\u0085ogham\u1680mvs\u180ezwsp\u200b\u200c\u200d\ufeff end\n",
    "👩‍👩‍👧‍👦 👩🏽‍🚀 🏳️‍🌈 🇩🇪🇫🇷 ❤️‍🔥 1️⃣ 🧑🏿‍🤝‍🧑🏻 ☺︎ 🫠🫡\n",
    "e\u0301 o\u0308\u0304 Z\u0351\u036b\u0343 a\u0300\u0301\u0302\u0303 क्षि நி ไทย ກຂ ស្រី བོད་ မြန်မာ\n",
    "中文字符，没有空格。日本語のテキスト、カタカナ。한국어 텍스트 𠮷𠀋 ｆｕｌｌ ＷＩＤＴＨ １２３\n",
    "שָׁלוֹם עולם العربية: مَرْحَبًا ١٢٣ \u202eoverride\u202c \u2067isolate\u2069 فارسی‌نیم\n",
    "Ελληνικά κείμενο, Кириллица ёЁ їЇ, Türkçe İıŞş, Tiếng Việt ườ, Íslenska ðþ, ქართული, հայերեն\n",
    "ﬁ ﬂ ŉ ǆ ǅ Ǆ ß ẞ Å Å K Ω µ μ ⅓ ™ © ® ‽ ⸘ — – ‑ … “quotes” ‘single’ «guillemets» „low“ ′ ″\n",
    "<|im_start|>user\nhi<|im_end|>\n<bos><eos><pad><unk><start_of_turn>user\nx<end_of_turn>\n<s></s>[INST]<0x0A><0xE2>\n",
    "<|endoftext|> <|fim_prefix|>a<fim_suffix>b <unused0><unused12><table><td>x</td></table><h1>T</h1><repo_name>\n",
    "▁▁▁ ▁a ▁ b▁c Ġ Ċ Ġhello âĢĻ\n",
    "\x01\x02\x03\x07\x08\x0b\x0c\x0e\x1b[31mred\x1b[0m\x1c\x1d\x1e\x1f\x7f \u0080\u0081\u009f\u00ad\n",
    "!!!??...---___===***###@@@$$$%%%^^^&&&((([[[{{{\\\\\\///|||~~~```\"\"\"'''::;;,,<<<>>>\n",
    "int main(void) { for (int i=0;i<10;++i) printf(\"%d\\n\", i*i); return 0; } // ok\n\tif x:\n\t\treturn  [y for y in z]\n",
    "https://example.org/a?b=c&d=%20e#f user.name+tag@mail.example C:\\path\\to\\file.txt 2024-02-29T23:59:60Z\n",
    "a" * 700 + "\n" + "ab" * 300 + "\n" + "ÿ" * 200 + "\n" + "。" * 100 + "\n" + "!" * 150 + "\n" + "9" * 100 + "\n",
    "\ue000\uf8ff\ufffd\ufffe\uffff\ufdd0\U000e0001\U000e0041\U0010ffff\U0001fffe \u0378\u0530 \U0001e030\U00011f00\n",
]
text = "".join(parts).encode()
# Broken UTF-8: lone continuation bytes, cut characters, bytes that never occur.
text += b"cut \xe2\x82 two \xf0\x9f\x98 one \xc3 lone \x80\xbf\xff\xfe end \xe2\x28\xa1 \xf0\x28\x8c\xbc \xc3\x28\n"
scripts = ["abcXYZ", "éüñ", "жЖщ", "漢字", "かナ", "한글", "אבג", "عرب", "हिन", "123", "٤٥", "  ", "\n", "\t", "'s", ".,;!", "😀👍🏽", "\u0301", "\u200d"]
for _ in range(400):
    text += "".join(random.choice(random.choice(scripts)) for _ in range(random.randint(1, 14))).encode()
text += b"\nunfinished \xf0\x9f\x98"
open(sys.argv[1], "wb").write(text)
