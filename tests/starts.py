"""How each recipe can start: what docs/recipes.md says, for tests and to be listed.

``python tests/starts.py`` prints every recipe with the file that it starts from by default and the
--cfg-options of its other starts.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
FILE = 'model.backbone.init_cfg.checkpoint=FILE'
OWN = f'{FILE} model.backbone.init_cfg.prefix=backbone.'
RANDOM = 'model.backbone.init_cfg=None'
LEARN_ALL = 'model.backbone.frozen_stages=-1 model.backbone.norm_eval=False'
COLD = 'model.backbone.warm_start=False'
AS_IS = 'model.backbone.convert_weights=False'


@dataclass(frozen=True)
class Start:
    """The starts of some recipes, each as the --cfg-options that it takes.

    Attributes:
        recipes (str): Pattern of the paths under configs/.
        checkpoint (str): Pattern of the file by default.
        own (str): From FILE, an ImageNet checkpoint of the same network, made by configs/imagenet.
        plain (str | None): From the plain network's weights, or FILE made of them; empty if that is
            the default. None if nothing does it, or if this is the plain network.
        random (str): From random weights.
    """

    recipes: str
    checkpoint: str
    own: str
    plain: str | None
    random: str

    def fits(self, recipe: str) -> bool:
        """Whether a recipe, as a path under configs/, starts so."""
        return re.match(self.recipes, recipe) is not None


STARTS = (
    Start('acmix_resnet/', r'checkpoints/acmix-r\d\d_in1k\.pth', FILE, FILE,
          f'{RANDOM} {LEARN_ALL}'),
    Start('x_volution/', r'checkpoints/x-volution-r50_in1k\.pth', FILE, None,
          f'{RANDOM} {LEARN_ALL}'),
    Start('resnet/.*r(26|38)_', r'checkpoints/r(26|38)_in1k\.pth', FILE, None,
          f'{RANDOM} {LEARN_ALL}'),
    Start('resnet/.*r50_', r'https://download\.pytorch\.org/models/resnet50-0676ba61\.pth', OWN,
          None, f'{RANDOM} {LEARN_ALL}'),
    Start('acmix_san/', r'checkpoints/san\d\d_patchwise\.pth', f'{OWN} {COLD}', '',
          f'{RANDOM} {COLD} {LEARN_ALL}'),
    Start('san/', r'checkpoints/san\d\d_patchwise\.pth', OWN, None, f'{RANDOM} {LEARN_ALL}'),
    Start('acmix_pvt/', r'https://github\.com/whai362/PVT/.*/pvt_(tiny|small)\.pth',
          f'{OWN} {COLD} {AS_IS}', '', f'{RANDOM} {COLD}'),
    # mmdet's class does not know prefixes.
    Start('pvt/', r'https://github\.com/whai362/PVT/.*/pvt_(tiny|small)\.pth',
          f'load_from=FILE {RANDOM}', None, RANDOM),
    Start('acmix_swin/(?!.*(in1k-pre|conv-swin))',
          r'https://github\.com/SwinTransformer/.*/swin_(tiny|small)_patch4_window7_224\.pth',
          f'{OWN} {COLD} {AS_IS}', '', f'{RANDOM} {COLD}'),
    Start('acmix_swin/.*in1k-pre',
          r'checkpoints/acmix_swin_(tiny|small)_patch4_window7_224\.pth',
          f'{OWN} {AS_IS}', None, RANDOM),
    Start('acmix_swin/.*conv-swin', r'checkpoints/conv-swin-t_in1k\.pth', FILE, None, RANDOM),
    Start('swin/',
          r'https://github\.com/SwinTransformer/.*/swin_(tiny|small)_patch4_window7_224\.pth',
          f'{OWN} {AS_IS}', None, RANDOM),
    Start('dwnet/(?!.*i-dynamic)',
          r'https://github\.com/Atten4Vis/.*/(dynamic_)?dwnet_(tiny|base)_224\.pth',
          f'{OWN} {AS_IS}', None, RANDOM),
    Start('dwnet/.*i-dynamic', r'checkpoints/i-dynamic-dwnet-t_in1k\.pth', FILE, None, RANDOM),
)  # fmt: skip

# From random weights for longer, by what the recipes' schedulers are.
LONGER = {
    'coco': 'train_cfg.max_epochs=72 param_scheduler.1.end=72 param_scheduler.1.milestones=[64,69]',
    'ade20k': 'train_cfg.max_iters=320000 param_scheduler.0.end=320000',
    'ade20k after a warm-up': 'train_cfg.max_iters=320000 param_scheduler.1.end=320000',
}


def recipes() -> list[str]:
    """All detectors and segmentors for COCO and ADE20K, as paths under configs/.

    But for those whose recipes are MMDetection's and MMSegmentation's own.
    """
    files = (*CONFIGS.rglob('*_coco.py'), *CONFIGS.rglob('*_ade20k-512x512.py'))
    recipes = sorted(str(file.relative_to(CONFIGS)) for file in files)
    return [recipe for recipe in recipes if not recipe.startswith('other_models/')]


def start_of(recipe: str) -> Start:
    """The one that a recipe, as a path under configs/, fits."""
    (start,) = [start for start in STARTS if start.fits(recipe)]
    return start


def longer(recipe: str) -> str:
    """Of ``LONGER`` the one for a recipe."""
    if recipe.endswith('_coco.py'):
        return LONGER['coco']
    schedulers = Config.fromfile(CONFIGS / recipe).param_scheduler
    return LONGER['ade20k' if len(schedulers) == 1 else 'ade20k after a warm-up']


def promised(recipe: str) -> list[str]:
    """The kinds of start of a recipe: 'default', 'own', 'plain' if there is another, 'random'."""
    return ['default', 'own', *(['plain'] if start_of(recipe).plain else []), 'random']


def options(recipe: str, kind: str) -> str:
    """The --cfg-options for a kind of start, with FILE for a file of it."""
    if kind == 'default':
        return ''
    line = getattr(start_of(recipe), kind)
    return f'{line} {longer(recipe)}' if kind == 'random' else line


if __name__ == '__main__':
    for recipe in recipes():
        file = Config.fromfile(CONFIGS / recipe).model.backbone.init_cfg.checkpoint
        plain = ', warm from the plain network' if start_of(recipe).plain == '' else ''
        print(f'{recipe}\n  default: {file}{plain}')
        for kind in promised(recipe)[1:]:
            print(f'  {kind + ":":8} {options(recipe, kind)}')
