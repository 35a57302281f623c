// The parts of the module lipgan._C, an op each.
#pragma once

#include <pybind11/pybind11.h>

namespace lipgan::python {

namespace py = pybind11;

void def_spectral_norm(py::module_& module);
void def_matrix_sqrt(py::module_& module);
void def_polar_factor(py::module_& module);
void def_symmetrize(py::module_& module);
void def_nearest_neighbours(py::module_& module);
void def_gradient_penalty(py::module_& module);
void def_mlp_gradient_penalty(py::module_& module);

}  // namespace lipgan::python
