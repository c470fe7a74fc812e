"""Write the model index: model-index.yml and metafile.yml in each folder of configs.

OpenMMLab's form, which mim and mmengine.hub read. All of it comes from the configs: parameters are
counted, FLOPs are those of one image of the input size in inference, a multiplication with its
addition is one (see tools/analysis_tools/complexity.py). Published accuracies are not in it, and
results only if this project measured them: none on COCO, ADE20K and ImageNet so far.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.structures import InstanceData
from torch import nn
from tqdm import tqdm

from acmix_mm.analysis.costs import Cost, network_costs
from acmix_mm.analysis.networks import image_size, without_checkpoints
from acmix_mm.command_line import Parser, program
from acmix_mm.files import write_whole
from acmix_mm.version import __version__
from acmix_mm.weights import build

ROOT = Path(__file__).resolve().parents[2]
HEADER = '# Written by tools/dev/model_index.py.\n'
ACMIX = (
    'https://arxiv.org/abs/2111.14556',
    'On the Integration of Self-Attention and Convolution',
)


@dataclass(frozen=True)
class Collection:
    """A family of backbones.

    Args:
        name: What it is called.
        pattern: Of the names of its configs; the first family whose pattern is in a name has it.
        folder: Of its recipes, below configs.
        paper: Address and title.
        code: Its source, in this project or another.
        architecture: What it is built of.
    """

    name: str
    pattern: str
    folder: str
    paper: tuple[str, str]
    code: str
    architecture: tuple[str, ...]

    def entry(self) -> dict:
        code = {'URL': self.code}
        if self.code.startswith('acmix_mm/'):
            code['Version'] = f'v{__version__}'
        return {
            'Name': self.name,
            'Metadata': {'Architecture': [*self.architecture]},
            'Paper': dict(zip(('URL', 'Title'), self.paper, strict=True)),
            'README': 'README.md',
            'Code': code,
        }


MMDET = 'https://github.com/open-mmlab/mmdetection/blob/v3.3.0/mmdet/models/backbones'
COLLECTIONS = (
    Collection(
        'ResNet-ACmix', 'acmix-r', 'acmix_resnet', ACMIX,
        'acmix_mm/backbones/acmix_resnet.py', ('ResNet', 'ACmix'),
    ),
    Collection(
        'SAN-ACmix', 'acmix-san', 'acmix_san', ACMIX,
        'acmix_mm/backbones/san.py', ('SAN', 'ACmix'),
    ),
    Collection(
        'PVT-ACmix', 'acmix-pvt', 'acmix_pvt', ACMIX,
        'acmix_mm/backbones/acmix_pvt.py', ('Pyramid Vision Transformer', 'ACmix'),
    ),
    Collection(
        'Swin-ACmix', '(acmix|conv)-swin', 'acmix_swin', ACMIX,
        'acmix_mm/backbones/acmix_swin.py', ('Swin Transformer', 'ACmix'),
    ),
    Collection(
        'X-volution', 'x-volution', 'x_volution',
        (
            'https://arxiv.org/abs/2106.02253',
            'X-volution: On the unification of convolution and self-attention',
        ),
        'acmix_mm/backbones/x_volution_resnet.py', ('ResNet', 'X-volution'),
    ),
    Collection(
        'DWNet', 'dwnet', 'dwnet',
        (
            'https://arxiv.org/abs/2106.04263',
            'On the Connection between Local Attention and Dynamic Depth-wise Convolution',
        ),
        'acmix_mm/backbones/dwnet.py', ('Dynamic Depth-wise Convolution',),
    ),
    Collection(
        'SAN', 'san', 'san',
        ('https://arxiv.org/abs/2004.13621', 'Exploring Self-attention for Image Recognition'),
        'acmix_mm/backbones/san.py', ('Patchwise Self-Attention',),
    ),
    Collection(
        'PVT', 'pvt', 'pvt',
        (
            'https://arxiv.org/abs/2102.12122',
            'Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without '
            'Convolutions',
        ),
        f'{MMDET}/pvt.py', ('Pyramid Vision Transformer',),
    ),
    Collection(
        'Swin Transformer', 'swin', 'swin',
        (
            'https://arxiv.org/abs/2103.14030',
            'Swin Transformer: Hierarchical Vision Transformer using Shifted Windows',
        ),
        f'{MMDET}/swin.py', ('Swin Transformer',),
    ),
    Collection(
        'CSPNeXt', 'cspnext', 'demo',
        (
            'https://arxiv.org/abs/2212.07784',
            'RTMDet: An Empirical Study of Designing Real-Time Object Detectors',
        ),
        f'{MMDET}/cspnext.py', ('CSPNeXt',),
    ),
    Collection(
        'ResNet', r'(^|_)r\d', 'resnet',
        ('https://arxiv.org/abs/1512.03385', 'Deep Residual Learning for Image Recognition'),
        f'{MMDET}/resnet.py', ('ResNet',),
    ),
)  # fmt: skip

# By the folder that a config reads; with the size of images that are not resized.
DATA = {
    'data/coco/': ('COCO 2017', None),
    'data/ade/': ('ADE20K', None),
    'data/imagenet/': ('ImageNet-1k', None),
    'data/scene_digits/imagenet/': ('scene digits, single', (48, 48)),
    'data/scene_digits/': ('scene digits', (96, 96)),
}


# Folders of what others inherit, and of templates.
NO_MODELS = ('_base_', 'own_data')


def config_folders() -> list[Path]:
    """The folders of models."""
    folders = (path for path in (ROOT / 'configs').iterdir() if path.name not in NO_MODELS)
    return sorted(folder for folder in folders if any(folder.glob('*.py')))


def first_comment(file: Path) -> str:
    """Whose recipe a config is: the comment that it begins with."""
    lines = re.match(r'((#.*\n)*)', file.read_text())[1].splitlines()
    return ' '.join(line.lstrip('# ') for line in lines)


def architecture(model: dict) -> list[str]:
    """Classes of a model, from the whole to the backbone."""
    parts = [model, *(model.get(key) for key in ('decode_head', 'neck', 'backbone'))]
    parts = [part[-1] if isinstance(part, list) else part for part in parts if part]
    return [part['type'].rpartition('.')[-1] for part in parts]


def build_model(cfg: Config) -> nn.Module:
    """The model of a config, nothing of it loaded."""
    return revert_sync_batchnorm(build(cfg, ConfigDict(without_checkpoints(cfg.model.to_dict()))))


def without_numbers(model: nn.Module) -> nn.Module:
    """A model on the meta device, which computes shapes alone, so that FLOPs take no time.

    Which regions a two-stage detector proposes, and from which map it takes each, would depend on
    numbers: it gets as many as its config lets through, and nothing that counts is left out.
    """
    model.to('meta')
    if not hasattr(model, 'roi_head'):
        return model

    def propose(maps: tuple[torch.Tensor, ...], *args, **kwargs) -> list[InstanceData]:
        model.rpn_head(maps)
        return [InstanceData(bboxes=maps[0].new_empty(model.test_cfg.rpn.max_per_img, 4))]

    model.rpn_head.predict = propose
    for extractor in model.roi_head.modules():
        if isinstance(extractor, SingleRoIExtractor):
            size = (extractor.out_channels, *extractor.roi_layers[0].output_size)
            extractor.forward = lambda maps, rois, size=size: maps[0].new_empty(len(rois), *size)
    return model


def count(cfg: Config, size: tuple[int, int]) -> Cost:
    """Parameters and FLOPs of a config's model for an image of that height and width."""
    try:
        return network_costs(without_numbers(build_model(cfg)), size).whole
    except RuntimeError:  # it asks for numbers in other places, too, as DETR and its kin do
        return network_costs(build_model(cfg), size).whole


_counted: dict[str, Cost] = {}


def entry(file: Path) -> dict:
    """What the model index says of a config."""
    cfg = Config.fromfile(file)
    root = cfg.test_dataloader.dataset.data_root
    data, size = next((DATA[path] for path in DATA if root.startswith(path)), (root, None))
    size = size or image_size(cfg)
    key = f'{size} {cfg.model}'
    if key not in _counted:
        _counted[key] = count(cfg, size)
    cost = _counted[key]
    loop, wrapper = cfg.train_cfg, cfg.optim_wrapper
    length = 'Epochs' if 'max_epochs' in loop else 'Iterations'
    batch = cfg.get('auto_scale_lr', {}).get('base_batch_size', cfg.train_dataloader.batch_size)
    techniques = [wrapper.optimizer.type]
    if wrapper.type == 'AmpOptimWrapper':
        techniques.append('Mixed Precision')
    return {
        'Name': file.stem,
        'In Collection': next(c.name for c in COLLECTIONS if re.search(c.pattern, file.stem)),
        'Config': str(file.relative_to(ROOT)),
        'Metadata': {
            'Architecture': architecture(cfg.model),
            'Parameters': cost.parameters,
            'FLOPs': cost.flops,
            'Input Size': f'{size[0]}x{size[1]}',
            'Training Data': data,
            'Training Techniques': techniques,
            'Batch Size': batch,
            length: loop.get('max_epochs', loop.get('max_iters')),
            'Recipe': first_comment(file),
        },
    }


def metafile(folder: Path) -> dict:
    """Contents of the metafile of a folder of configs."""
    collections = [c.entry() for c in COLLECTIONS if c.folder == folder.name]
    files = tqdm(sorted(folder.glob('*.py')), desc=folder.name, unit='config')
    return {'Collections': collections, 'Models': [entry(file) for file in files]}


def dump(content: dict) -> str:
    return HEADER + yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True)


@program
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folders = config_folders()
    names = [folder.name for folder in folders]
    parser.add_argument(
        'folders', nargs='*', metavar='FOLDER',
        help=f'metafiles to write, of {", ".join(names)} (default: all)',
    )  # fmt: skip
    args = parser.parse_args(argv)
    unknown = {*args.folders} - {*names}
    if unknown:
        parser.error(f'argument FOLDER: {unknown.pop()!r} is none of {", ".join(names)}')
    for folder in folders:
        if not args.folders or folder.name in args.folders:
            write_whole(folder / 'metafile.yml', dump(metafile(folder)))
    files = [f'configs/{name}/metafile.yml' for name in names]
    write_whole(ROOT / 'model-index.yml', dump({'Import': files}))


if __name__ == '__main__':
    main()
