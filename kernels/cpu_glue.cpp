// The way from Python tensors to a row kernel, in about half a microsecond.
//
// Tensors are read through DLPack's C exchange API (50 ns each, shape and strides included;
// `data_ptr()`, `shape` and `stride()` together cost 400 ns), so nothing here depends on torch's
// C++ ABI. Outputs come from the allocator given to `bind`. Compiled after cpu_args.h.
#include <Python.h>

namespace {

// The part of dlpack.h (version 1) that is used.
struct DLDevice {
  int type, id;
};
struct DLDataType {
  unsigned char code, bits;
  unsigned short lanes;
};
struct DLTensor {
  char* data;
  DLDevice device;
  int ndim;
  DLDataType dtype;
  fx_i64* shape;
  fx_i64* strides;
  unsigned long long byte_offset;
};
struct DLExchange {
  unsigned major, minor;
  void *previous, *allocator, *from_object, *to_object;
  int (*view)(void* object, DLTensor* out);
};
enum { DL_CPU = 1, DL_FLOAT = 2, DL_BFLOAT = 4 };

enum Role { X, RESIDUAL, WEIGHT, BIAS, ROLES };
enum Output { OUT, SUM, ROW, OUTPUTS };
const char* const NAMES[ROLES] = {"x", "residual", "weight", "bias"};

// Work below this many elements stays on the calling thread, which then also keeps the GIL.
enum { PARALLEL = 32768 };

struct Shape {  // what an allocation needs, kept from the last call
  PyObject* size = nullptr;
  PyObject* stride = nullptr;
};

struct Bound {
  void (*run)(const FxArgs*);
  const DLExchange* dlpack;
  PyObject *empty, *thread_count, *contiguous;
  DLDataType dtype[ROLES];     // lanes is 0 for a role that the spec does not have
  PyObject* made[OUTPUTS];     // dtype objects; null for an output that is not made
  int ndim = -1;
  fx_i64 shape[32];
  Shape full, single;          // (..., hidden) and (..., 1)
};

struct Operand {
  DLTensor t;
  PyObject* copy = nullptr;  // owned: the contiguous copy that `t` describes
  ~Operand() { Py_XDECREF(copy); }
};

bool is_dense(const DLTensor& t) {
  fx_i64 step = 1;
  for (int d = t.ndim - 1; d >= 0; step *= t.shape[d--])
    if (t.shape[d] != 1 && t.strides[d] != step) return false;
  return true;
}

fx_i64 elements(const DLTensor& t) {
  fx_i64 count = 1;
  for (int d = 0; d < t.ndim; ++d) count *= t.shape[d];
  return count;
}

bool make_dense(const Bound& b, PyObject* object, Operand& o) {
  PyObject* copy = PyObject_CallMethodNoArgs(object, b.contiguous);
  if (!copy) return false;
  Py_XSETREF(o.copy, copy);
  return b.dlpack->view(copy, &o.t) == 0;
}

bool read(const Bound& b, PyObject* object, Role role, Operand& o) {
  if (b.dlpack->view(object, &o.t)) return false;
  const DLDataType& want = b.dtype[role];
  if (o.t.device.type == DL_CPU && o.t.dtype.code == want.code && o.t.dtype.bits == want.bits)
    return true;
  const char* code = want.code == DL_BFLOAT ? "bfloat" : "float";
  PyObject *dtype = PyObject_GetAttrString(object, "dtype"),
           *device = PyObject_GetAttrString(object, "device");
  if (dtype && device)
    PyErr_Format(PyExc_TypeError, "cpu.row: %s is %S on %S, needs torch.%s%d on cpu", NAMES[role],
                 dtype, device, code, (int)want.bits);
  Py_XDECREF(dtype);
  Py_XDECREF(device);
  return false;
}

// weight, bias: dense, `rows` x hidden.
bool read_rows(const Bound& b, PyObject* object, Role role, fx_i64 hidden, Operand& o,
               const void** data, fx_i64* rows) {
  if (!b.dtype[role].lanes) return true;
  if (!read(b, object, role, o)) return false;
  if (!is_dense(o.t) && !make_dense(b, object, o)) return false;
  fx_i64 count = elements(o.t);
  if (count == 0 || count % hidden) {
    PyErr_Format(PyExc_ValueError, "cpu.row: %s has %lld elements, needs a multiple of hidden %lld",
                 NAMES[role], (long long)count, (long long)hidden);
    return false;
  }
  *data = o.t.data + o.t.byte_offset;
  *rows = count / hidden;
  return true;
}

// Leading dims with adjacent ones merged where both strides allow it. False if too many are left.
bool merge_dims(const DLTensor& x, const DLTensor* residual, FxArgs& a) {
  int n = 0;
  a.x_stride[0] = a.residual_stride[0] = 0;
  for (int d = 0; d < x.ndim - 1; ++d) {
    fx_i64 size = x.shape[d], xs = x.strides[d], rs = residual ? residual->strides[d] : 0;
    if (size == 1) continue;
    bool joins = n > 0 && a.x_stride[n - 1] == xs * size && a.residual_stride[n - 1] == rs * size;
    if (!joins && n == FX_DIMS) return false;
    n += !joins;
    a.size[n - 1] = joins ? a.size[n - 1] * size : size;
    a.x_stride[n - 1] = xs;
    a.residual_stride[n - 1] = rs;
  }
  a.dims = n ? n : 1;
  return true;
}

bool last_is_dense(const DLTensor& t) {
  return t.shape[t.ndim - 1] == 1 || t.strides[t.ndim - 1] == 1;
}

bool read_x(const Bound& b, PyObject* const* argv, Operand& x, Operand& residual, FxArgs& a) {
  if (!read(b, argv[X], X, x)) return false;
  bool two = b.dtype[RESIDUAL].lanes;
  if (two && !read(b, argv[RESIDUAL], RESIDUAL, residual)) return false;
  bool same = !two || x.t.ndim == residual.t.ndim;
  for (int d = 0; two && same && d < x.t.ndim; ++d) same = x.t.shape[d] == residual.t.shape[d];
  if (!same || x.t.ndim < 1 || x.t.ndim > 32 || x.t.shape[x.t.ndim - 1] < 1) {
    PyErr_SetString(PyExc_ValueError,
                    "cpu.row: x needs 1 to 32 dims, hidden >= 1 and the residual's shape");
    return false;
  }
  const DLTensor* r = two ? &residual.t : nullptr;
  if (!last_is_dense(x.t) || (two && !last_is_dense(*r)) || !merge_dims(x.t, r, a)) {
    if (!make_dense(b, argv[X], x)) return false;
    if (two && !make_dense(b, argv[RESIDUAL], residual)) return false;
    merge_dims(x.t, r, a);
  }
  a.hidden = x.t.shape[x.t.ndim - 1];
  a.rows = elements(x.t) / a.hidden;
  a.x = x.t.data + x.t.byte_offset;
  if (two) a.residual = residual.t.data + residual.t.byte_offset;
  return true;
}

bool set_shape(Shape& s, const fx_i64* sizes, int ndim, bool single) {
  Py_XSETREF(s.size, PyTuple_New(ndim));
  Py_XSETREF(s.stride, PyTuple_New(ndim));
  if (!s.size || !s.stride) return false;
  fx_i64 step = 1;
  for (int d = ndim - 1; d >= 0; --d) {
    fx_i64 size = single && d == ndim - 1 ? 1 : sizes[d];
    PyObject *size_object = PyLong_FromLongLong(size), *step_object = PyLong_FromLongLong(step);
    PyTuple_SET_ITEM(s.size, d, size_object);
    PyTuple_SET_ITEM(s.stride, d, step_object);
    if (!size_object || !step_object) return false;
    step *= size > 1 ? size : 1;
  }
  return true;
}

bool remember_shape(Bound& b, const DLTensor& x) {
  bool known = x.ndim == b.ndim;
  for (int d = 0; known && d < x.ndim; ++d) known = b.shape[d] == x.shape[d];
  if (known) return true;
  b.ndim = -1;
  if (!set_shape(b.full, x.shape, x.ndim, false)) return false;
  if (!set_shape(b.single, x.shape, x.ndim, true)) return false;
  for (int d = 0; d < x.ndim; ++d) b.shape[d] = x.shape[d];
  b.ndim = x.ndim;
  return true;
}

PyObject* allocate(const Bound& b, const Shape& s, PyObject* dtype, void** data) {
  PyObject* args[3] = {s.size, s.stride, dtype};
  PyObject* tensor = PyObject_Vectorcall(b.empty, args, 3, nullptr);
  DLTensor t;
  if (tensor && b.dlpack->view(tensor, &t)) Py_CLEAR(tensor);
  if (tensor) *data = t.data + t.byte_offset;
  return tensor;
}

bool run(const Bound& b, FxArgs& a) {
  a.threads = 1;
  if (a.rows <= 1 || a.rows * a.hidden < PARALLEL) {
    b.run(&a);
    return true;
  }
  PyObject* count = PyObject_CallNoArgs(b.thread_count);
  if (!count) return false;
  a.threads = PyLong_AsLong(count);
  Py_DECREF(count);
  Py_BEGIN_ALLOW_THREADS b.run(&a);
  Py_END_ALLOW_THREADS return !PyErr_Occurred();
}

// One tensor as it is, several as a tuple. Takes the references.
PyObject* packed(PyObject* const* made) {
  int count = 0;
  for (int o = 0; o < OUTPUTS; ++o) count += made[o] != nullptr;
  if (count == 1) return made[OUT];
  PyObject* tuple = PyTuple_New(count);
  for (int o = 0, k = 0; tuple && o < OUTPUTS; ++o)
    if (made[o]) PyTuple_SET_ITEM(tuple, k++, made[o]);
  return tuple;
}

// (x, residual, weight, bias, eps)
PyObject* launch(PyObject* self, PyObject* const* argv, Py_ssize_t argc) {
  Bound& b = *(Bound*)PyCapsule_GetPointer(self, nullptr);
  if (argc != 5) {
    PyErr_Format(PyExc_TypeError, "cpu.row: %zd arguments, needs 5", argc);
    return nullptr;
  }
  FxArgs a{};
  Operand operand[ROLES];
  a.eps = PyFloat_AsDouble(argv[4]);
  if (a.eps == -1.0 && PyErr_Occurred()) return nullptr;
  if (!read_x(b, argv, operand[X], operand[RESIDUAL], a)) return nullptr;
  if (!read_rows(b, argv[WEIGHT], WEIGHT, a.hidden, operand[WEIGHT], &a.weight, &a.weight_rows) ||
      !read_rows(b, argv[BIAS], BIAS, a.hidden, operand[BIAS], &a.bias, &a.bias_rows) ||
      !remember_shape(b, operand[X].t))
    return nullptr;
  PyObject* made[OUTPUTS] = {};
  void** data[OUTPUTS] = {&a.out, &a.sum, &a.row};
  bool fine = true;
  for (int o = 0; fine && o < OUTPUTS; ++o) {
    if (!b.made[o]) continue;
    made[o] = allocate(b, o == ROW ? b.single : b.full, b.made[o], data[o]);
    fine = made[o] != nullptr;
  }
  if (fine && run(b, a)) return packed(made);
  for (int o = 0; o < OUTPUTS; ++o) Py_XDECREF(made[o]);
  return nullptr;
}

DLDataType dtype_named(const char* name) {
  if (!*name) return {0, 0, 0};
  unsigned char code = name[0] == 'b' ? DL_BFLOAT : DL_FLOAT;
  return {code, (unsigned char)(name[strlen(name) - 1] == '2' ? 32 : 16), 1};
}

PyMethodDef launch_method = {"launch", (PyCFunction)(void*)launch, METH_FASTCALL,
                             "(x, residual, weight, bias, eps) -> tensor, or tuple of tensors"};

// (address of fxpass_run, exchange API, empty_strided, get_num_threads, short dtype names or "" of
// x, residual, weight, bias, dtypes or None of out, sum, row) -> launch. Never freed: one per spec.
PyObject* bind(PyObject*, PyObject* args) {
  unsigned long long address;
  PyObject *exchange, *empty, *threads, *made[OUTPUTS];
  const char* names[ROLES];
  if (!PyArg_ParseTuple(args, "KOOO(ssss)(OOO)", &address, &exchange, &empty, &threads, &names[0],
                        &names[1], &names[2], &names[3], &made[0], &made[1], &made[2]))
    return nullptr;
  auto* dlpack = (const DLExchange*)PyCapsule_GetPointer(exchange, "dlpack_exchange_api");
  if (!dlpack) return nullptr;
  if (dlpack->major != 1) {
    PyErr_Format(PyExc_ImportError, "DLPack %u, needs 1", dlpack->major);
    return nullptr;
  }
  Bound* b = new Bound();
  b->run = (void (*)(const FxArgs*))address;
  b->dlpack = dlpack;
  b->contiguous = PyUnicode_InternFromString("contiguous");
  b->empty = Py_NewRef(empty);
  b->thread_count = Py_NewRef(threads);
  for (int r = 0; r < ROLES; ++r) b->dtype[r] = dtype_named(names[r]);
  for (int o = 0; o < OUTPUTS; ++o) b->made[o] = made[o] == Py_None ? nullptr : Py_NewRef(made[o]);
  PyObject* self = PyCapsule_New(b, nullptr, nullptr);
  return self ? PyCFunction_New(&launch_method, self) : nullptr;
}

PyMethodDef methods[] = {{"bind", bind, METH_VARARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "fxpass_cpu_glue", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_fxpass_cpu_glue() { return PyModule_Create(&module); }
