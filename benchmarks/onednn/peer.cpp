// BN + ReLU of oneDNN in train mode, forward and backward, on buffers that Python owns; channels last, float32.
#include <oneapi/dnnl/dnnl.hpp>

#include <unordered_map>

using namespace dnnl;

namespace {

struct Peer {
  engine cpu{engine::kind::cpu, 0};
  stream queue{cpu};
  batch_normalization_forward forward;
  batch_normalization_backward backward;
  std::unordered_map<int, memory> forward_arguments, backward_arguments;
};

}  // namespace

extern "C" {

void* peer_new(int64_t n, int64_t c, int64_t h, int64_t w, float* x, float* dy, float* scale, float* shift, float* y,
               float* dx) {
  auto* peer = new Peer;
  const memory::desc image({n, c, h, w}, memory::data_type::f32, memory::format_tag::nhwc);
  const auto flags = normalization_flags::use_scale | normalization_flags::use_shift | normalization_flags::fuse_norm_relu;
  const batch_normalization_forward::primitive_desc forward(peer->cpu, prop_kind::forward_training, image, image, 1e-5f,
                                                            flags);
  const batch_normalization_backward::primitive_desc backward(peer->cpu, prop_kind::backward, image, image, image, 1e-5f,
                                                              flags, forward);
  const memory source(image, peer->cpu, x), mean(forward.mean_desc(), peer->cpu), var(forward.variance_desc(), peer->cpu);
  const memory gamma(forward.weights_desc(), peer->cpu, scale), beta(forward.weights_desc(), peer->cpu, shift);
  const memory workspace(forward.workspace_desc(), peer->cpu);
  peer->forward = batch_normalization_forward(forward);
  peer->backward = batch_normalization_backward(backward);
  peer->forward_arguments = {{DNNL_ARG_SRC, source},   {DNNL_ARG_SCALE, gamma},
                             {DNNL_ARG_SHIFT, beta},   {DNNL_ARG_MEAN, mean},
                             {DNNL_ARG_VARIANCE, var}, {DNNL_ARG_WORKSPACE, workspace},
                             {DNNL_ARG_DST, memory(image, peer->cpu, y)}};
  peer->backward_arguments = {{DNNL_ARG_SRC, source},
                              {DNNL_ARG_SCALE, gamma},
                              {DNNL_ARG_MEAN, mean},
                              {DNNL_ARG_VARIANCE, var},
                              {DNNL_ARG_WORKSPACE, workspace},
                              {DNNL_ARG_DIFF_DST, memory(image, peer->cpu, dy)},
                              {DNNL_ARG_DIFF_SRC, memory(image, peer->cpu, dx)},
                              {DNNL_ARG_DIFF_SCALE, memory(forward.weights_desc(), peer->cpu)},
                              {DNNL_ARG_DIFF_SHIFT, memory(forward.weights_desc(), peer->cpu)}};
  return peer;
}

void peer_step(void* handle) {
  auto* peer = static_cast<Peer*>(handle);
  peer->forward.execute(peer->queue, peer->forward_arguments);
  peer->backward.execute(peer->queue, peer->backward_arguments);
  peer->queue.wait();
}

void peer_delete(void* handle) { delete static_cast<Peer*>(handle); }
}
