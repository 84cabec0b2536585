package ctrd

import (
	"fmt"
	"runtime/debug"

	"github.com/workspaced/workspaced/runtime"
)

// guard calls f in a goroutine of the driver's own, where a panic would end the
// daemon: it becomes an error of the call that the goroutine works for.
func (d *Driver) guard(what string, f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			d.log.Error("panic in "+what, "panic", p, "stack", string(debug.Stack()))
			err = &runtime.Error{
				Reason: runtime.ReasonRuntimeError, Message: what + ": the daemon's own fault, see its log", Err: fmt.Errorf("panic: %v", p),
			}
		}
	}()
	return f()
}
