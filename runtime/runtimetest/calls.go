package runtimetest

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/workspaced/workspaced/runtime"
)

// What execve takes of an environment, on Linux with the usual stack limit.
const (
	maxEnvString = 128 << 10 // with the NUL at its end
	maxEnvTotal  = 2 << 20
)

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
	return c.Method == Start || c.Method == Stop || c.Method == Remove
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

// EnsureImage implements Runtime.
func (d *Daemon) EnsureImage(ctx context.Context, ref string) (digest string, err error) {
	err = d.call(ctx, Call{Method: EnsureImage, Image: ref}, func(ctx context.Context, _ *Call) error {
		if err := d.lock(ctx); err != nil {
			return err
		}
		defer d.fake.mu.Unlock()
		image, err := d.fake.pull(ref)
		digest = image.Digest
		return err
	}, nil)
	if err != nil {
		return "", err
	}
	return digest, nil
}

func (f *Fake) pull(ref string) (Image, error) {
	if ref == "" || strings.ContainsAny(ref, " \t\n") {
		return Image{}, &runtime.Error{Reason: runtime.ReasonImageInvalid,
			Message: fmt.Sprintf("%q is no image reference", ref), Permanent: true}
	}
	if image, ok := f.images[ref]; ok {
		return image, nil
	}
	image, ok := f.registry[ref]
	if !ok && f.anyImage {
		image, ok = Image{Digest: digest(ref), Entrypoint: []string{"/entrypoint"}}, true
	}
	if !ok {
		return Image{}, imageNotFound(ref)
	}
	f.images[ref] = image
	return image, nil
}

func imageNotFound(ref string) error {
	return &runtime.Error{Reason: runtime.ReasonImageNotFound, Message: fmt.Sprintf("there is no image %q", ref)}
}

// Prepare implements Runtime.
func (d *Daemon) Prepare(ctx context.Context, spec runtime.Spec) (prepared runtime.Instance, err error) {
	var in *instance
	c := Call{
		Method: Prepare, WorkspaceID: spec.WorkspaceID, WorkspaceUID: spec.WorkspaceUID,
		Image: spec.Image, Generation: spec.Generation,
	}
	err = d.call(ctx, c, func(ctx context.Context, c *Call) error {
		if err := d.lock(ctx); err != nil {
			return err
		}
		defer d.fake.mu.Unlock()
		var err error
		if in, err = d.fake.prepare(spec); err != nil {
			return err
		}
		c.InstanceID = in.ID
		prepared = in.snapshot()
		return nil
	}, func(done bool) {
		if done && in.Phase == runtime.PhaseStandby {
			in.toRemnant()
		}
	})
	if err != nil {
		return runtime.Instance{}, err
	}
	return prepared, nil
}

func (f *Fake) prepare(spec runtime.Spec) (*instance, error) {
	if f.gone[spec.WorkspaceUID] {
		f.violation("Prepare for workspace %s (uid %s), which was removed", spec.WorkspaceID, spec.WorkspaceUID)
	}
	image, ok := f.images[spec.Image]
	if !ok {
		return nil, imageNotFound(spec.Image)
	}
	if err := f.check(spec, image); err != nil {
		return nil, err
	}
	argv, cmd, err := resolve(spec, image)
	if err != nil {
		return nil, err
	}
	for _, m := range spec.Mounts {
		if m.Volume == "" {
			continue
		}
		if f.volumes[spec.WorkspaceID] == nil {
			f.volumes[spec.WorkspaceID] = make(map[string]map[string]string)
		}
		if f.volumes[spec.WorkspaceID][m.Volume] == nil {
			f.volumes[spec.WorkspaceID][m.Volume] = make(map[string]string)
		}
	}
	f.logs[spec.WorkspaceID] = true
	f.numbers[spec.WorkspaceID]++
	f.prepared++
	in := &instance{
		Instance: runtime.Instance{
			ID:          fmt.Sprintf("%s-%d", spec.WorkspaceID, f.numbers[spec.WorkspaceID]),
			WorkspaceID: spec.WorkspaceID, WorkspaceUID: spec.WorkspaceUID,
			Phase:              runtime.PhaseStandby,
			PreparedGeneration: spec.Generation,
			ImageDigest:        image.Digest,
			PID:                1000 + f.prepared,
		},
		number: f.prepared, spec: spec, image: image, cmd: cmd, argv: argv,
		files: make(map[string]string), gone: make(chan struct{}),
	}
	f.instances[in.ID] = in
	f.byUID[in.WorkspaceUID] = append(f.byUID[in.WorkspaceUID], in)
	return in, nil
}

// check finds what is wrong with a spec, but for its command.
func (f *Fake) check(spec runtime.Spec, image Image) error {
	user := spec.User
	if user == "" {
		user = image.User
	}
	for name := range strings.SplitSeq(user, ":") {
		if name != "" && image.Users != nil && !slices.Contains(image.Users, name) && strings.Trim(name, "0123456789") != "" {
			return &runtime.Error{Reason: runtime.ReasonUserNotFound,
				Message: fmt.Sprintf("the image has no user or group %q", name), Permanent: true}
		}
	}
	dir := spec.WorkingDir
	if dir == "" {
		dir = image.WorkingDir
	}
	if dir != "" && dir != "/" && image.Dirs != nil && !slices.Contains(image.Dirs, path.Clean(dir)) &&
		!slices.ContainsFunc(spec.Mounts, func(m runtime.Mount) bool { return path.Clean(m.Path) == path.Clean(dir) }) {
		return &runtime.Error{Reason: runtime.ReasonWorkingDir,
			Message: fmt.Sprintf("there is no directory %q", dir), Permanent: true}
	}
	for _, m := range spec.Mounts {
		if m.HostPath != "" && f.missing[m.HostPath] {
			return &runtime.Error{Reason: runtime.ReasonVolume,
				Message: fmt.Sprintf("the host has no %q", m.HostPath)}
		}
	}
	return nil
}

// resolve finds the command.
func resolve(spec runtime.Spec, image Image) (argv []string, cmd Command, err error) {
	entrypoint, args := image.Entrypoint, image.Cmd
	if len(spec.Command) > 0 {
		entrypoint, args = spec.Command, nil
	}
	if len(spec.Args) > 0 {
		args = spec.Args
	}
	argv = slices.Concat(entrypoint, args)
	if len(argv) == 0 {
		return nil, Command{}, &runtime.Error{Reason: runtime.ReasonCommandMissing,
			Message: "neither the spec nor the image names a command", Permanent: true}
	}
	cmd, ok := image.Commands[argv[0]]
	if !ok && image.Exact {
		return nil, Command{}, &runtime.Error{Reason: runtime.ReasonCommandNotFound,
			Message: fmt.Sprintf("the image has no %q", argv[0]), Permanent: true}
	}
	return argv, cmd, cmd.PrepareErr
}

// Start implements Runtime.
func (d *Daemon) Start(ctx context.Context, id string, launch runtime.Launch) (started runtime.Instance, err error) {
	c := Call{Method: Start, InstanceID: id, Generation: launch.Generation}
	err = d.call(ctx, c, func(ctx context.Context, _ *Call) error {
		if err := d.lock(ctx); err != nil {
			return err
		}
		defer d.fake.mu.Unlock()
		var err error
		started, err = d.fake.start(id, launch)
		return err
	}, func(done bool) {
		in := d.fake.instances[id]
		if in == nil {
			return
		}
		// A command of which nobody learned that it was started must not go on.
		if done && in.Phase == runtime.PhaseRunning {
			in.toExited(killed())
		}
		if !done && in.Phase == runtime.PhaseStandby {
			in.toRemnant()
		}
	})
	if err != nil {
		return runtime.Instance{}, err
	}
	return started, nil
}

func (f *Fake) start(id string, launch runtime.Launch) (runtime.Instance, error) {
	in := f.instances[id]
	if in == nil {
		f.violation("Start of instance %s, which does not exist", id)
		return runtime.Instance{}, runtime.ErrNotFound
	}
	if in.Phase != runtime.PhaseStandby {
		if !in.died {
			f.violation("Start of instance %s, which is %s", id, in.Phase)
		}
		return runtime.Instance{}, &runtime.Error{Reason: runtime.ReasonStartInterrupted,
			Message: fmt.Sprintf("instance %s is no standby but %s", id, in.Phase), Permanent: false}
	}
	if f.gone[in.WorkspaceUID] {
		f.violation("Start of instance %s, whose workspace was removed", id)
	}
	for _, other := range f.byUID[in.WorkspaceUID] {
		if other.Phase == runtime.PhaseRunning {
			f.violation("Start of instance %s while %s runs for the same workspace", id, other.ID)
		}
	}
	env := environment(in.image.Env, launch.Env)
	total := 0
	for _, kv := range env {
		total += len(kv) + 1
		if len(kv) >= maxEnvString || total > maxEnvTotal {
			key, _, _ := strings.Cut(kv, "=")
			return runtime.Instance{}, &runtime.Error{Reason: runtime.ReasonEnvironmentTooLarge,
				Message: fmt.Sprintf("the environment is too large at variable %q", key), Permanent: true}
		}
	}
	in.Generation = launch.Generation
	in.SecretVersions = launch.SecretVersions
	in.SecretVersions = in.snapshot().SecretVersions
	if in.cmd.StartErr != nil {
		return runtime.Instance{}, in.cmd.StartErr
	}
	in.StartTime = time.Now()
	in.Phase = runtime.PhaseRunning
	started := in.snapshot()
	f.launches = append(f.launches, Launched{
		Instance: in.snapshot(), Spec: in.spec, Argv: slices.Clone(in.argv), Env: env,
	})
	if exit := in.cmd.Exit; exit != nil {
		f.endAfter(in, in.cmd.Lifetime, *exit)
	}
	return started, nil
}

// endAfter ends a command in a while. The lock is held.
func (f *Fake) endAfter(in *instance, delay time.Duration, exit runtime.Exit) {
	if delay <= 0 {
		in.toExited(exit)
		return
	}
	time.AfterFunc(delay, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if in.Phase == runtime.PhaseRunning {
			in.toExited(exit)
		}
	})
}

func killed() runtime.Exit {
	return runtime.Exit{Code: 128 + int(syscall.SIGKILL), Known: true, Signal: int(syscall.SIGKILL)}
}

// Stop implements Runtime.
func (d *Daemon) Stop(ctx context.Context, id string, signal syscall.Signal, grace time.Duration) error {
	return d.call(ctx, Call{Method: Stop, InstanceID: id}, func(ctx context.Context, _ *Call) error {
		if err := d.lock(ctx); err != nil {
			return err
		}
		in := d.fake.instances[id]
		if in != nil {
			d.fake.signal(in, signal)
		}
		d.fake.mu.Unlock()
		if in == nil {
			return runtime.ErrNotFound
		}
		timer := time.NewTimer(grace)
		defer timer.Stop()
		select {
		case <-in.gone:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		}
		if err := d.lock(ctx); err != nil {
			return err
		}
		defer d.fake.mu.Unlock()
		if in.Phase == runtime.PhaseRunning {
			in.toExited(killed())
		}
		return nil
	}, nil)
}

// signal sends a signal to the first process.
func (f *Fake) signal(in *instance, signal syscall.Signal) {
	switch in.Phase {
	case runtime.PhaseStandby:
		in.died = true
		in.toRemnant()
	case runtime.PhaseRunning:
		switch {
		case signal == syscall.SIGKILL:
			in.toExited(killed())
		case in.cmd.StopDelay >= 0 && !in.stopping:
			in.stopping = true
			f.endAfter(in, in.cmd.StopDelay, runtime.Exit{Known: true})
		}
	}
}

// Wait implements Runtime.
func (d *Daemon) Wait(ctx context.Context, id string) (exit runtime.Exit, err error) {
	err = d.call(ctx, Call{Method: Wait, InstanceID: id}, func(ctx context.Context, _ *Call) error {
		if err := d.lock(ctx); err != nil {
			return err
		}
		in := d.fake.instances[id]
		phase := runtime.PhaseRemnant
		if in != nil {
			phase = in.Phase
		}
		d.fake.mu.Unlock()
		if in == nil {
			return runtime.ErrNotFound
		}
		if phase != runtime.PhaseRunning && phase != runtime.PhaseExited {
			return &runtime.Error{Reason: runtime.ReasonRuntimeError,
				Message: fmt.Sprintf("instance %s is %s: it was not started", id, phase)}
		}
		select {
		case <-in.gone:
		case <-ctx.Done():
			return ctx.Err()
		}
		if err := d.lock(ctx); err != nil {
			return err
		}
		defer d.fake.mu.Unlock()
		exit = *in.Exit
		return nil
	}, nil)
	if err != nil {
		return runtime.Exit{}, err
	}
	return exit, nil
}

// Remove implements Runtime.
func (d *Daemon) Remove(ctx context.Context, id string) error {
	return d.call(ctx, Call{Method: Remove, InstanceID: id}, func(ctx context.Context, _ *Call) error {
		if err := d.lock(ctx); err != nil {
			return err
		}
		f := d.fake
		defer f.mu.Unlock()
		in := f.instances[id]
		if in == nil {
			return nil
		}
		switch in.Phase {
		case runtime.PhaseRunning:
			in.toExited(killed())
		case runtime.PhaseStandby:
			in.toRemnant()
		}
		delete(f.instances, id)
		f.byUID[in.WorkspaceUID] = slices.DeleteFunc(f.byUID[in.WorkspaceUID], func(other *instance) bool { return other == in })
		if len(f.byUID[in.WorkspaceUID]) == 0 {
			delete(f.byUID, in.WorkspaceUID)
		}
		return nil
	}, nil)
}

// List implements Runtime.
func (d *Daemon) List(ctx context.Context, uid string) (list []runtime.Instance, err error) {
	err = d.call(ctx, Call{Method: List, WorkspaceUID: uid}, func(ctx context.Context, _ *Call) error {
		if err := d.lock(ctx); err != nil {
			return err
		}
		defer d.fake.mu.Unlock()
		list = d.fake.list(uid)
		return nil
	}, nil)
	if err != nil {
		return nil, err
	}
	return list, nil
}

// RemoveWorkspace implements Runtime.
func (d *Daemon) RemoveWorkspace(ctx context.Context, id, uid string, keepVolumes bool) error {
	c := Call{Method: RemoveWorkspace, WorkspaceID: id, WorkspaceUID: uid}
	return d.call(ctx, c, func(ctx context.Context, _ *Call) error {
		if err := d.lock(ctx); err != nil {
			return err
		}
		f := d.fake
		defer f.mu.Unlock()
		for _, in := range f.byUID[uid] {
			f.violation("RemoveWorkspace of %s (uid %s) while it has instance %s", id, uid, in.ID)
		}
		f.gone[uid] = true
		delete(f.logs, id)
		if !keepVolumes {
			delete(f.volumes, id)
		}
		return nil
	}, nil)
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

// Start implements Runtime.
func (f *Fake) Start(ctx context.Context, id string, launch runtime.Launch) (runtime.Instance, error) {
	return f.Daemon().Start(ctx, id, launch)
}

// Stop implements Runtime.
func (f *Fake) Stop(ctx context.Context, id string, signal syscall.Signal, grace time.Duration) error {
	return f.Daemon().Stop(ctx, id, signal, grace)
}

// Wait implements Runtime.
func (f *Fake) Wait(ctx context.Context, id string) (runtime.Exit, error) {
	return f.Daemon().Wait(ctx, id)
}

// Remove implements Runtime.
func (f *Fake) Remove(ctx context.Context, id string) error { return f.Daemon().Remove(ctx, id) }

// List implements Runtime.
func (f *Fake) List(ctx context.Context, uid string) ([]runtime.Instance, error) {
	return f.Daemon().List(ctx, uid)
}

// RemoveWorkspace implements Runtime.
func (f *Fake) RemoveWorkspace(ctx context.Context, id, uid string, keepVolumes bool) error {
	return f.Daemon().RemoveWorkspace(ctx, id, uid, keepVolumes)
}
