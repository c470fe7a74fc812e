"""The model index: every config is in it once, with numbers that follow from the config."""

import re
from collections import Counter
from pathlib import Path

import model_index
import pytest
import yaml
from mmengine.config import Config
from test_imagenet_configs import ABLATIONS, PARAMETERS

from acmix_mm.analysis.costs import network_costs
from acmix_mm.analysis.networks import initial_model

ROOT = Path(__file__).resolve().parents[1]
INDEX = yaml.safe_load((ROOT / 'model-index.yml').read_text())
METAFILES = {path: yaml.safe_load((ROOT / path).read_text()) for path in INDEX['Import']}
COLLECTIONS = [c for metafile in METAFILES.values() for c in metafile['Collections']]
MODELS = {model['Config']: model for file in METAFILES.values() for model in file['Models']}
# One of each kind of model and of each family, at the least cost.
SAMPLE = (
    'configs/imagenet/acmix-r26_8xb32-100e_in1k.py',
    'configs/imagenet/acmix-pvt-t_8xb128-300e_in1k.py',
    'configs/demo/retinanet_acmix-san10_fpn_scene-digits.py',
    'configs/demo/retinanet_x-volution-r26_fpn_scene-digits.py',
    'configs/demo/acmix-swin_upernet_scene-digits.py',
)


def test_every_config_is_listed_once():
    listed = [model['Config'] for file in METAFILES.values() for model in file['Models']]
    assert Counter(listed) == Counter(
        str(file.relative_to(ROOT))
        for file in ROOT.glob('configs/*/*.py')
        if file.parent.name not in ('_base_', 'own_data')  # inherited; templates
    )
    names = Counter(model['Name'] for model in MODELS.values())
    assert names == Counter(Path(config).stem for config in listed)
    assert max(names.values()) == 1
    for path, metafile in METAFILES.items():
        assert all(Path(m['Config']).parent == Path(path).parent for m in metafile['Models'])


def test_collections():
    names = [collection['Name'] for collection in COLLECTIONS]
    assert sorted(names) == sorted({*names})
    assert {model['In Collection'] for model in MODELS.values()} <= {*names}
    for collection in COLLECTIONS:
        assert (ROOT / collection['README']).is_file()
        url = collection['Code']['URL']
        assert url.startswith('https://') or (ROOT / url).is_file()
        assert re.fullmatch(r'https://arxiv\.org/abs/\d{4}\.\d{5}', collection['Paper']['URL'])


def test_only_what_was_measured():
    """No results, no weights: this project has none to give so far."""
    assert not [model for model in MODELS.values() if {'Results', 'Weights'} & {*model}]


def test_parameters_as_published():
    """Of image classifiers, to the last one where that is known."""
    known = {**PARAMETERS, **ABLATIONS}
    compared = 0
    for path, model in MODELS.items():
        number = known.get(Path(path).stem.split('_')[0])
        if path.endswith('_in1k.py') and number is not None:
            relative = 0.05 if number < 1000 else 0  # millions, as the papers print them
            millions = number * 1e6 if number < 1000 else number
            assert model['Metadata']['Parameters'] == pytest.approx(millions, rel=relative), path
            compared += 1
    assert compared > 25


def check(path: str) -> None:
    """What is listed, by running the model itself on an image."""
    said = MODELS[path]['Metadata']
    cfg = Config.fromfile(ROOT / path)
    model = initial_model(cfg)
    assert said['Parameters'] == sum(p.numel() for p in model.parameters())
    height, width = map(int, said['Input Size'].split('x'))
    if 'roi_head' in cfg.model and height < 800:
        return  # a small image has not as many regions as are let through
    assert said['FLOPs'] == network_costs(model, (height, width)).whole.flops
    length = cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters
    assert said.get('Epochs', said.get('Iterations')) == length
    assert said['Recipe'].split()[:4] == (ROOT / path).read_text().lstrip('# ').split()[:4]


@pytest.mark.parametrize('path', SAMPLE)
def test_numbers_of_a_sample(path):
    check(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    'path',
    [
        'configs/acmix_resnet/retinanet_acmix-r50_fpn_8xb2-1x_coco.py',
        'configs/acmix_swin/mask-rcnn_acmix-swin-t_fpn_8xb2-1x_coco.py',
        'configs/acmix_pvt/cascade-mask-rcnn_acmix-pvt-t_fpn_8xb2-1x_coco.py',
        'configs/resnet/faster-rcnn_r50_fpn_8xb2-1x_coco.py',
        'configs/acmix_swin/acmix-swin-t_upernet_8xb2-160k_ade20k-512x512.py',
    ],
)
def test_numbers_of_recipes(path):
    """At the full size, where there are as many regions as are let through."""
    check(path)


@pytest.mark.slow
@pytest.mark.parametrize('file', METAFILES)
def test_up_to_date(file):
    """What tools/dev/model_index.py would write today."""
    assert METAFILES[file] == model_index.metafile((ROOT / file).parent)


def test_read_by_the_format_s_own_library():
    modelindex = pytest.importorskip('modelindex')
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    assert len(index.models) == len(MODELS)
