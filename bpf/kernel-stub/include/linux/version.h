#define LINUX_VERSION_CODE 330240 /* 5.10.0: the oldest kernel that the programs are written for */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
