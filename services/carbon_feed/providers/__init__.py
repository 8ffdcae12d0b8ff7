"""Carbon intensity providers. A new one is a module here, with its `Source`, and an entry in `AnySource`."""

from typing import Annotated

from pydantic import Field

from services.carbon_feed.providers.constant import ConstantSource
from services.carbon_feed.providers.electricity_maps import ElectricityMapsSource
from services.carbon_feed.providers.recorded import CsvSource

AnySource = Annotated[CsvSource | ConstantSource | ElectricityMapsSource, Field(discriminator="kind")]
"""Every kind of provider that the configuration can name."""
