#include "go_asm.h"
#include "textflag.h"

// See standby.go, and standby_amd64.s, of which this is the other wording. A call
// of the kernel takes its number in R8 and its arguments in R0 to R5; it returns in
// R0, from -4095 to -1 an error.

#define SYS_fcntl      25
#define SYS_faccessat  48
#define SYS_read       63
#define SYS_write      64
#define SYS_newfstatat 79
#define SYS_exit_group 94
#define SYS_execve     221
#define SYS_mmap       222
#define SYS_madvise    233

#define EINTR               4
#define AT_FDCWD            -100
#define X_OK                1
#define S_IFMT              0xf000
#define S_IFREG             0x8000
#define F_SETFD             2
#define FD_CLOEXEC          1
#define PROT_READ_WRITE     3
#define MAP_BLOCK           0x104022 // PRIVATE, ANONYMOUS, NORESERVE, FIXED_NOREPLACE
#define MADV_POPULATE_WRITE 23
#define STAT_SIZE           128
#define STAT_MODE           16

#define STANDBY_NAME 0x7962646e617473 // "standby" and its zero

#define READ  R19 // bytes read
#define PATHS R20
#define ERRNO R21 // why there is no command, 0 if none was found
#define BLOCK R22
#define SELF  R23 // the path of this program
#define HOME  R24 // "HOME=..." or 0

TEXT workspace_init_entry(SB), NOSPLIT|NOFRAME, $0
	MOVD 8(RSP), R0
	CBZ  R0, init
	MOVD (R0), R0
	MOVD $STANDBY_NAME, R1
	CMP  R1, R0
	BEQ  standby

init:
	JMP _rt0_arm64_linux(SB)

standby:
	MOVD 16(RSP), SELF
	MOVD 32(RSP), HOME
	SUB  $STAT_SIZE, RSP

	// No command inherits the FIFOs.
	MOVD $SYS_fcntl, R8
	MOVD $const_goAheadFD, R0
	MOVD $F_SETFD, R1
	MOVD $FD_CLOEXEC, R2
	SVC
	MOVD $SYS_fcntl, R8
	MOVD $const_resultFD, R0
	MOVD $F_SETFD, R1
	MOVD $FD_CLOEXEC, R2
	SVC

	MOVD $SYS_mmap, R8
	MOVD $const_blockAddress, R0
	MOVD $const_blockLimit, R1
	MOVD $PROT_READ_WRITE, R2
	MOVD $MAP_BLOCK, R3
	MOVD $-1, R4
	MOVD $0, R5
	SVC
	MOVD R0, BLOCK
	MOVD $const_blockAddress, R1
	MOVD $const_exitUsage, R2
	CMP  R1, R0
	BNE  exit
	MOVD $SYS_madvise, R8 // where the kernel can't, it is given when it is needed
	MOVD $const_blockPresent, R1
	MOVD $MADV_POPULATE_WRITE, R2
	SVC

	MOVD $SYS_write, R8
	MOVD $const_resultFD, R0
	MOVD $·readyFrame(SB), R1
	MOVD $const_frameSize, R2
	SVC
	CMP  $const_frameSize, R0
	BNE  gone

	MOVD $0, READ

read:
	MOVD $SYS_read, R8
	MOVD $const_goAheadFD, R0
	ADD  READ, BLOCK, R1
	MOVD $const_blockLimit, R2
	SUB  READ, R2, R2
	SVC
	CMN  $EINTR, R0
	BEQ  read
	CMP  $0, R0
	BLE  gone // the end, or an error
	ADD  R0, READ, READ
	CMP  $const_blockHeader, READ
	BLT  read
	MOVD (BLOCK), R0
	MOVD $const_blockMagic, R1
	CMP  R1, R0
	BNE  gone
	MOVD const_blockSize(BLOCK), R0
	CMP  R0, READ
	BLT  read // a size above the limit: until nothing can be read any more
	BNE  gone

	MOVD const_blockHome(BLOCK), R0
	CBZ  R0, look
	MOVD HOME, (R0)

look:
	MOVD $0, ERRNO
	MOVD const_blockPaths(BLOCK), PATHS

next:
	MOVD (PATHS), R1
	CBZ  R1, explain
	ADD  $8, PATHS, PATHS
	MOVD $SYS_faccessat, R8
	MOVD $AT_FDCWD, R0
	MOVD $X_OK, R2
	SVC
	CBNZ R0, next
	MOVD $SYS_newfstatat, R8
	MOVD $AT_FDCWD, R0
	MOVD -8(PATHS), R1
	ADD  $0, RSP, R2
	MOVD $0, R3
	SVC
	CBNZ R0, next
	MOVWU STAT_MODE(RSP), R0
	AND  $S_IFMT, R0, R0
	MOVD $S_IFREG, R1
	CMP  R1, R0
	BNE  next

	MOVD $SYS_write, R8
	MOVD $const_resultFD, R0
	MOVD $·executingFrame(SB), R1
	MOVD $const_frameSize, R2
	SVC
	CMP  $const_frameSize, R0
	BNE  gone
	MOVD $SYS_execve, R8
	MOVD -8(PATHS), R0
	MOVD const_blockArgv(BLOCK), R1
	MOVD const_blockEnvp(BLOCK), R2
	SVC
	NEG  R0, ERRNO

explain:
	// First of all that there is no command: an end of the FIFO after the executing
	// frame, and nothing else, would say that there is one.
	CMP  $255, ERRNO
	BLE  report
	MOVD $255, ERRNO

report:
	MOVD $·failedFrame(SB), R1
	MOVB ERRNO, const_frameErrno(R1)
	MOVD $SYS_write, R8
	MOVD $const_resultFD, R0
	MOVD $const_frameSize, R2
	SVC

	MOVD const_blockErrno(BLOCK), R1
	LSR  $4, ERRNO, R0
	ADD  $'a', R0, R0
	MOVB R0, (R1)
	AND  $15, ERRNO, R0
	ADD  $'a', R0, R0
	MOVB R0, 1(R1)
	MOVD $SYS_fcntl, R8
	MOVD $const_resultFD, R0
	MOVD $F_SETFD, R1
	MOVD $0, R2
	SVC
	MOVD $SYS_execve, R8
	MOVD SELF, R0
	MOVD const_blockExplainArgv(BLOCK), R1
	MOVD const_blockExplainEnvp(BLOCK), R2
	SVC
	MOVD $const_exitRefused, R2
	B    exit

gone:
	MOVD $const_exitNoDaemon, R2

exit:
	MOVD R2, R0
	MOVD $SYS_exit_group, R8
	SVC
	BRK
