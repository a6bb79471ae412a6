"""Neural tangent kernels of any torch module: the function-space view of amortised inference.

The empirical kernel ``K(x, x') = J(x) J(x')^T`` of a network with ``q`` outputs is a matrix of ``q`` by ``q`` for every
pair of inputs. Three routes give it, and agree to rounding: :func:`jacobian_gram` for any module,
:func:`layerwise_gram` for dense ones at a cost without the number of parameters, and :func:`ntk_product` that never
builds it. :func:`relu_kernel` and :func:`circle_spectrum` are the limits of wide ReLU networks in closed form, and
:class:`LinearisedNetwork` is the network whose kernel never moves.

:func:`kernel_report` says in words what a kernel allows, :func:`alignment` where a target lies in it, and
:func:`kernel_drift` and :func:`width_sweep` how far it moves. For any loss of the outputs :func:`predicted_flow` gives
the path of functions, :func:`flow_rates` its rates and :func:`certificate` a bound; :func:`compare_flow` trains a
network beside all three. :func:`adam_scales` gives the kernel under Adam, :func:`compare_kernels` says which kernel
predicts what was realised, and :func:`jacobian_drift` how far the Jacobians themselves move.
"""

from vifamily.ntk.drift import DriftRecorder, KernelDrift, WidthSweep, jacobian_drift, kernel_drift, width_sweep
from vifamily.ntk.flow import PredictedFlow, predicted_flow
from vifamily.ntk.gram import jacobian_gram, largest_eigenvalue, layerwise_gram, ntk_product
from vifamily.ntk.infinite import TwoLayerReLU, circle_spectrum, relu_kernel
from vifamily.ntk.linearised import LinearisedNetwork
from vifamily.ntk.preconditioned import KernelComparison, adam_scales, compare_kernels
from vifamily.ntk.rates import Certificate, FlowRates, certificate, flow_rates
from vifamily.ntk.realised import FlowReport, compare_flow
from vifamily.ntk.spectrum import Alignment, KernelReport, alignment, kernel_report

__all__ = [
    "Alignment",
    "Certificate",
    "DriftRecorder",
    "FlowRates",
    "FlowReport",
    "KernelComparison",
    "KernelDrift",
    "KernelReport",
    "LinearisedNetwork",
    "PredictedFlow",
    "TwoLayerReLU",
    "WidthSweep",
    "adam_scales",
    "alignment",
    "certificate",
    "circle_spectrum",
    "compare_flow",
    "compare_kernels",
    "flow_rates",
    "jacobian_drift",
    "jacobian_gram",
    "kernel_drift",
    "kernel_report",
    "largest_eigenvalue",
    "layerwise_gram",
    "ntk_product",
    "predicted_flow",
    "relu_kernel",
    "width_sweep",
]
