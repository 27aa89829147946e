"""The forms. A new form is a file here and an entry in ``FORMS``."""

from __future__ import annotations

from effattn.lowering.forms.dhsa import DHSA
from effattn.lowering.forms.exact import EXACT
from effattn.lowering.forms.form import Form, Params, Rule
from effattn.lowering.forms.linear import LINEAR
from effattn.lowering.forms.power import POWER
from effattn.lowering.forms.proxy import PROXY
from effattn.lowering.forms.window import WINDOW

FORMS: dict[str, Form] = {form.name: form for form in (EXACT, WINDOW, POWER, PROXY, DHSA, LINEAR)}

__all__ = ["FORMS", "Form", "Params", "Rule"]
