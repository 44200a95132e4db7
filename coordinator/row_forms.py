"""RowForms: activation rows under every scheme that their readers take, each made once."""

from coordinator.array_types import F32
from shoal import ops
from shoal.quant import Scheme
from shoal.rows import Rows


class RowForms:
    """Rows [T, D] float32, quantised when first asked for.

    made: the same rows, as they were quantised already.
    """

    def __init__(self, values: F32, *made: Rows) -> None:
        self._values = values
        self._forms = {rows.scheme: rows for rows in made}

    @property
    def num_rows(self) -> int:
        return len(self._values)

    def get(self, scheme: Scheme) -> Rows:
        """Return the rows under that scheme. Raises NumericError with the non-finite rows."""
        form = self._forms.get(scheme)
        if form is None:
            form = self._forms[scheme] = ops.quantise_rows(scheme, self._values)
        return form
