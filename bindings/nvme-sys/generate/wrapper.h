/* What nvme-sys is generated from. */
#include <linux/types.h>
#include <linux/ioctl.h>
#include <linux/nvme_ioctl.h>
#include <nvme/types.h>

/* Request numbers contain casts and sizes, which bindgen does not evaluate in macros. */
#define VALUE(name) static const unsigned int name##_VALUE = name;
VALUE(NVME_IOCTL_ID)
VALUE(NVME_IOCTL_ADMIN_CMD)
VALUE(NVME_IOCTL_IO_CMD)
VALUE(NVME_IOCTL_RESET)
VALUE(NVME_IOCTL_SUBSYS_RESET)
VALUE(NVME_IOCTL_RESCAN)
VALUE(NVME_IOCTL_ADMIN64_CMD)
VALUE(NVME_IOCTL_IO64_CMD)
VALUE(NVME_URING_CMD_IO)
VALUE(NVME_URING_CMD_IO_VEC)
VALUE(NVME_URING_CMD_ADMIN)
VALUE(NVME_URING_CMD_ADMIN_VEC)
