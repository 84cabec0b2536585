package runtimetest

import (
	"context"
	"syscall"
	"time"

	"github.com/workspaced/workspaced/runtime"
)

// Daemon is a Runtime: a Fake as one daemon process sees it.
type Daemon struct {
	fake  *Fake
	life  context.Context // ends with the daemon
	crash context.CancelFunc
}

func newDaemon(f *Fake) *Daemon {
	d := &Daemon{fake: f}
	d.life, d.crash = context.WithCancel(context.Background())
	return d
}

// errCrashed is what the calls of a daemon that crashed return.
var errCrashed = &runtime.Error{Reason: runtime.ReasonRuntimeUnavailable, Message: "the daemon has crashed"}

// call is the frame of every method: the log, the hooks, and the daemon's end.
// The effect runs when all hooks have let the call pass; it takes the lock
// itself, through lock. failed, when not nil, runs under the lock when the call
// fails while the daemon lives, and says whether the effect had happened.
func (d *Daemon) call(ctx context.Context, c Call, effect func(ctx context.Context, c *Call) error, failed func(done bool)) (err error) {
	f := d.fake
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(d.life, cancel)()

	number := f.begin(d, &c)
	done := false
	panicked := true
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if d.life.Err() != nil {
			err = errCrashed // even if the effect happened: nobody is there to be told
		} else if (err != nil || panicked) && failed != nil {
			failed(done)
		}
		f.end(d, number, c, err)
	}()

	err = f.before.run(ctx, c)
	if err == nil {
		err = effect(ctx, &c)
	}
	if err == nil {
		done = true
		err = f.after.run(ctx, c)
	}
	panicked = false
	return err
}

// begin logs a call and fills in what the instance says of its workspace.
func (f *Fake) begin(d *Daemon, c *Call) (number int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if in := f.instances[c.InstanceID]; in != nil {
		c.WorkspaceID, c.WorkspaceUID = in.WorkspaceID, in.WorkspaceUID
	}
	if c.changesInstance() {
		if other, ok := f.busy[c.InstanceID]; ok && other.daemon == d {
			f.violation("%s and %s of instance %s at once", other.method, c.Method, c.InstanceID)
		}
		f.busy[c.InstanceID] = busy{d, c.Method}
	}
	f.calls = append(f.calls, *c)
	return len(f.calls) - 1
}

func (f *Fake) end(d *Daemon, number int, c Call, err error) {
	if c.changesInstance() && f.busy[c.InstanceID] == (busy{d, c.Method}) {
		delete(f.busy, c.InstanceID)
	}
	c.Done, c.Err = true, err
	f.calls[number] = c
}

func (c *Call) changesInstance() bool {
	return c.Method == Start || c.Method == Rotate || c.Method == Stop || c.Method == Remove
}

// lock takes the lock for an effect, unless the call must not have one any more.
func (d *Daemon) lock(ctx context.Context) error {
	d.fake.mu.Lock()
	err := ctx.Err()
	if d.life.Err() != nil {
		err = errCrashed
	}
	if err != nil {
		d.fake.mu.Unlock()
	}
	return err
}

// The methods of Runtime, as calls of the daemon that is alive now.

// EnsureImage implements Runtime.
func (f *Fake) EnsureImage(ctx context.Context, ref string) (digest string, err error) {
	return f.Daemon().EnsureImage(ctx, ref)
}

// Prepare implements Runtime.
func (f *Fake) Prepare(ctx context.Context, spec runtime.Spec) (runtime.Instance, error) {
	return f.Daemon().Prepare(ctx, spec)
}

// Arm implements Runtime.
func (f *Fake) Arm(ctx context.Context, id string, launch runtime.Launch) error {
	return f.Daemon().Arm(ctx, id, launch)
}

// Start implements Runtime.
func (f *Fake) Start(ctx context.Context, id string, launch runtime.Launch) (runtime.Instance, error) {
	return f.Daemon().Start(ctx, id, launch)
}

// Rotate implements Runtime.
func (f *Fake) Rotate(ctx context.Context, id string, rotation runtime.Rotation) (runtime.Instance, error) {
	return f.Daemon().Rotate(ctx, id, rotation)
}

// Stop implements Runtime.
func (f *Fake) Stop(ctx context.Context, id string, signal syscall.Signal, grace time.Duration) error {
	return f.Daemon().Stop(ctx, id, signal, grace)
}

// Watch implements Runtime.
func (f *Fake) Watch(ctx context.Context, id string, ended func(runtime.Exit)) (stop func(), err error) {
	return f.Daemon().Watch(ctx, id, ended)
}

// Remove implements Runtime.
func (f *Fake) Remove(ctx context.Context, id string) error { return f.Daemon().Remove(ctx, id) }

// List implements Runtime.
func (f *Fake) List(ctx context.Context, uid string) ([]runtime.Instance, error) {
	return f.Daemon().List(ctx, uid)
}

// Foreign implements Runtime.
func (f *Fake) Foreign(ctx context.Context) (map[string]int, error) { return f.Daemon().Foreign(ctx) }

// RemoveWorkspace implements Runtime.
func (f *Fake) RemoveWorkspace(ctx context.Context, id, uid string, keepVolumes bool) error {
	return f.Daemon().RemoveWorkspace(ctx, id, uid, keepVolumes)
}
