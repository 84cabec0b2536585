package ctrd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/workspaced/workspaced/runtime"
)

// errClosed is the answer of a driver after Close.
var errClosed = &runtime.Error{Reason: runtime.ReasonRuntimeUnavailable, Message: "the daemon is shutting down"}

// failure makes the *runtime.Error for an error of a step that ctx bounded.
func failure(ctx context.Context, step string, err error) error {
	var known *runtime.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &known):
		return err
	case errors.Is(err, runtime.ErrNotFound):
		return err
	case errors.Is(ctx.Err(), context.DeadlineExceeded), errors.Is(err, context.DeadlineExceeded), code(err) == codes.DeadlineExceeded:
		return &runtime.Error{
			Reason:  runtime.ReasonTimeout,
			Message: step + " took longer than its deadline" + at(err),
			Err:     errors.Join(context.DeadlineExceeded, err),
		}
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", step, errors.Join(ctx.Err(), err))
	case storageCause(err) != "":
		return &runtime.Error{Reason: runtime.ReasonStorage, Message: step + at(err) + ": " + storageCause(err), Err: err}
	case unavailable(err):
		return &runtime.Error{Reason: runtime.ReasonRuntimeUnavailable, Message: step + at(err) + ": containerd does not answer", Err: err}
	default:
		return &runtime.Error{Reason: runtime.ReasonRuntimeError, Message: step + ": " + short(err), Err: err}
	}
}

// unavailable tells a containerd that can't be reached: raw gRPC errors are no
// errdefs errors.
func unavailable(err error) bool {
	return errdefs.IsUnavailable(err) || code(err) == codes.Unavailable
}

// storageCause says in words what is wrong with a disk; it is empty for other
// errors. containerd's come without a type: that there is no space is plain all
// the same, while what it calls read-only may be a container's own root.
func storageCause(err error) string {
	for _, errno := range []unix.Errno{unix.ENOSPC, unix.EDQUOT, unix.EROFS, unix.EIO} {
		if errors.Is(err, errno) {
			var at *os.PathError
			if errors.As(err, &at) {
				return at.Path + ": " + errno.Error()
			}
			return errno.Error()
		}
	}
	if containsAny(err, unix.ENOSPC.Error(), unix.EDQUOT.Error()) {
		return short(err)
	}
	return ""
}

func code(err error) codes.Code {
	if err == nil {
		return codes.OK
	}
	return status.Code(err)
}

// short makes one line of a runtime's error. Nothing secret ever reaches
// containerd, so none comes back.
func short(err error) string {
	text := strings.Join(strings.Fields(strings.ToValidUTF8(err.Error(), "?")), " ")
	const limit = 300
	if len(text) > limit {
		text = strings.ToValidUTF8(text[:limit], "") + "..."
	}
	return text
}
