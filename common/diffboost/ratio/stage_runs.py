"""A stage that another one runs several times: its config, its settings, and its command."""

import logging
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import monai.bundle
from monai.bundle import ConfigParser

from diffboost.cost.configs import parse
from diffboost.stages import bundle_run

logger = logging.getLogger(__name__)


class BundleRun:
    """A stage as the search runs it: config files, what the study decides, and knobs.

    Args:
        config_files: the config file, then its overlays.
        settings: what is the same in all runs, such as folders and fold; None leaves a key out.
        knobs: of the experiment's section; none of the settings.
        processes: of torchrun; above 1 the last config file is an overlay for it.

    Raises:
        ValueError: no config file is named, or a knob is one of the settings.

    Source: engineering choice
    """

    def __init__(
        self,
        config_files: Sequence[str | Path] | str | None,
        settings: Mapping,
        knobs: Mapping | None = None,
        processes: int = 1,
    ) -> None:
        if not config_files:
            raise ValueError("synthesis_configs and segmenter_configs: both must be named")
        files = [config_files] if isinstance(config_files, str | Path) else config_files
        self.config_files = [str(file) for file in files]
        self.settings = {key: value for key, value in settings.items() if value is not None}
        self.knobs = dict(knobs or {})
        self.processes = processes
        bundle_run(self.config_files, self.settings, self.knobs)  # raises where both name a key

    @cached_property
    def parser(self) -> ConfigParser:
        """The config with settings and knobs, on the meta device: for its values and its cost."""
        return parse(self.config_files, self.settings | self.knobs)

    def value(self, key: str) -> object:
        """What a knob is."""
        return self.parser.get_parsed_content(key)

    def __call__(self, **own) -> None:
        """Runs the stage, here or as a command of several processes; ``own``: of this run alone."""
        values = self.settings | self.knobs | own
        command = bundle_run(self.config_files, values, {}, self.processes)
        logger.info("%s", command)
        if self.processes > 1:
            subprocess.run(shlex.split(command), check=True)
            return
        root = str(Path(self.config_files[0]).parents[1])
        texts = {key: str(item) if isinstance(item, Path) else item for key, item in values.items()}
        monai.bundle.run(config_file=self.config_files, bundle_root=root, **texts)
