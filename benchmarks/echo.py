"""MLServer's own ceiling: a runtime that answers at once, in the form of a text-classification."""

from __future__ import annotations

import mlserver
from mlserver.types import InferenceRequest, InferenceResponse, Parameters, ResponseOutput


class EchoRuntime(mlserver.MLModel):  # type: ignore[misc]
    """Answers every request with one label."""

    async def load(self) -> bool:
        """Nothing to load."""
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """The same answer to everything."""
        output = ResponseOutput(
            name="output",
            datatype="BYTES",
            shape=[1, 1],
            data=['{"label":"POSITIVE","score":0.5}'],
            parameters=Parameters(content_type="hg_jsonlist"),
        )
        return InferenceResponse(model_name=self.name, outputs=[output])
