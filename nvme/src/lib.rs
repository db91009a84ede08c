//! Bytes at offsets: devices, queues and buffers. Knows no tensors.
