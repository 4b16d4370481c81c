/* BCC includes this first. The system's linux/bpf.h must not follow the copy that BCC carries. */
#define CONFIG_BPF_SYSCALL 1
#define __LINUX_BPF_H__
