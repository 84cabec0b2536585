package runtimetest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/workspaced/workspaced/runtime"
)

// What execve takes, on Linux with the usual stack limit.
const (
	maxEnvString = 128 << 10 // with the NUL at its end
	maxTotal     = 2 << 20   // environment and arguments, see stringBytes
)

// stringBytes is what strings take of maxTotal: each its NUL and a pointer more.
func stringBytes(list []string) int {
	total := 0
	for _, s := range list {
		total += len(s) + 1 + 8
	}
	return total
}

func checkTotal(total int) error {
	if total <= maxTotal {
		return nil
	}
	return &runtime.Error{Reason: runtime.ReasonEnvironmentTooLarge,
		Message: fmt.Sprintf("arguments and environment take %d bytes, more than %d", total, maxTotal), Permanent: true}
}

// Arm implements Runtime.
func (d *Daemon) Arm(ctx context.Context, id string, launch runtime.Launch) error {
	c := Call{Method: Arm, InstanceID: id, Generation: launch.Generation}
	return d.call(ctx, c, func(ctx context.Context, _ *Call) error {
		if err := d.lock(ctx); err != nil {
			return err
		}
		defer d.fake.mu.Unlock()
		in, err := d.fake.standby(Arm, id)
		if err != nil {
			return err
		}
		in.armed = nil
		if _, _, err = in.take(launch); err == nil { // Start takes what it is given then
			in.armed = &launch
		}
		return err
	}, nil)
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

// standby returns the instance that the method is for.
func (f *Fake) standby(method Method, id string) (*instance, error) {
	in := f.instances[id]
	if in == nil {
		f.violation("%s of instance %s, which does not exist", method, id)
		return nil, runtime.ErrNotFound
	}
	if in.Phase != runtime.PhaseStandby {
		if !in.died {
			f.violation("%s of instance %s, which is %s", method, id, in.Phase)
		}
		return nil, &runtime.Error{Reason: runtime.ReasonStartInterrupted,
			Message: fmt.Sprintf("instance %s is no standby but %s", id, in.Phase), Permanent: false}
	}
	if f.gone[in.WorkspaceUID] {
		f.violation("%s of instance %s, whose workspace was removed", method, id)
	}
	return in, nil
}

// take makes environment and files of a launch, or says why there is none.
func (in *instance) take(launch runtime.Launch) (env []string, files map[string]string, err error) {
	env = environment(in.image.Env, launch.Env)
	for _, kv := range env {
		if len(kv) >= maxEnvString {
			key, _, _ := strings.Cut(kv, "=")
			return nil, nil, &runtime.Error{Reason: runtime.ReasonEnvironmentTooLarge,
				Message: fmt.Sprintf("the environment is too large at variable %q", key), Permanent: true}
		}
	}
	if err := checkTotal(stringBytes(env) + stringBytes(in.argv)); err != nil {
		return nil, nil, err
	}
	files, err = filesOf(launch.Files)
	return env, files, err
}

func (f *Fake) start(id string, launch runtime.Launch) (runtime.Instance, error) {
	in, err := f.standby(Start, id)
	if err != nil {
		return runtime.Instance{}, err
	}
	for _, other := range f.byUID[in.WorkspaceUID] {
		if other.Phase == runtime.PhaseRunning {
			f.violation("Start of instance %s while %s runs for the same workspace", id, other.ID)
		}
	}
	env, secrets, err := in.take(launch)
	if err != nil {
		return runtime.Instance{}, err
	}
	in.secrets = secrets
	in.Generation = launch.Generation
	in.SecretVersions = maps.Clone(launch.SecretVersions)
	in.GlobalSecrets = slices.Clone(launch.GlobalSecrets)
	if in.cmd.StartErr != nil {
		return runtime.Instance{}, in.cmd.StartErr
	}
	in.StartTime = time.Now()
	in.Phase = runtime.PhaseRunning
	started := in.snapshot()
	f.launches = append(f.launches, Launched{
		Instance: in.snapshot(), Spec: in.spec, Argv: slices.Clone(in.argv), Env: env, Files: slices.Clone(launch.Files),
		Armed: in.armed != nil && in.armed.Equal(launch),
	})
	if exit := in.cmd.Exit; exit != nil {
		f.endAfter(in, in.cmd.Lifetime, *exit)
	}
	return started, nil
}

// filesOf returns the files by name.
func filesOf(list []runtime.File) (map[string]string, error) {
	files := make(map[string]string, len(list))
	for _, f := range list {
		if _, twice := files[f.Name]; twice || !runtime.FileName.MatchString(f.Name) {
			return nil, &runtime.Error{Reason: runtime.ReasonRuntimeError,
				Message: fmt.Sprintf("%.140q is no name for a file, or comes twice", f.Name), Permanent: true}
		}
		files[f.Name] = string(f.Data)
	}
	return files, nil
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

// Rotate implements Runtime.
func (d *Daemon) Rotate(ctx context.Context, id string, rotation runtime.Rotation) (rotated runtime.Instance, err error) {
	c := Call{Method: Rotate, InstanceID: id, Generation: rotation.Generation}
	err = d.call(ctx, c, func(ctx context.Context, _ *Call) error {
		if err := d.lock(ctx); err != nil {
			return err
		}
		defer d.fake.mu.Unlock()
		var err error
		rotated, err = d.fake.rotate(id, rotation)
		return err
	}, nil)
	if err != nil {
		return runtime.Instance{}, err
	}
	return rotated, nil
}

func (f *Fake) rotate(id string, rotation runtime.Rotation) (runtime.Instance, error) {
	in := f.instances[id]
	switch {
	case in == nil:
		return runtime.Instance{}, runtime.ErrNotFound
	case in.Phase != runtime.PhaseRunning:
		return runtime.Instance{}, runtime.ErrNotRunning
	case in.Generation >= rotation.Generation:
		return in.snapshot(), nil
	}
	files, err := filesOf(rotation.Files)
	if err != nil {
		return runtime.Instance{}, err
	}
	versions := maps.Clone(in.SecretVersions)
	if versions == nil {
		versions = make(map[string]int64)
	}
	for name, content := range in.secrets {
		if slices.Contains(rotation.Keep, name) {
			files[name] = content
			continue
		}
		delete(versions, name)
	}
	maps.Copy(versions, rotation.SecretVersions)
	in.secrets, in.Generation, in.SecretVersions = files, rotation.Generation, versions
	in.GlobalSecrets = rotation.GlobalsAfter(in.GlobalSecrets, versions)
	if rotation.Signal != 0 {
		in.signals = append(in.signals, rotation.Signal)
	}
	return in.snapshot(), nil
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
		in.Stopped = true
		in.died = true
		in.toRemnant()
	case runtime.PhaseRunning:
		in.Stopped = true
		switch {
		case signal == syscall.SIGKILL:
			in.toExited(killed())
		case in.cmd.StopDelay >= 0 && !in.stopping:
			in.stopping = true
			f.endAfter(in, in.cmd.StopDelay, runtime.Exit{Known: true})
		}
	}
}

// Watch implements Runtime.
func (d *Daemon) Watch(ctx context.Context, id string, ended func(runtime.Exit)) (stop func(), err error) {
	w := &watcher{daemon: d, ended: ended}
	err = d.call(ctx, Call{Method: Watch, InstanceID: id}, func(ctx context.Context, _ *Call) error {
		if err := d.lock(ctx); err != nil {
			return err
		}
		defer d.fake.mu.Unlock()
		in := d.fake.instances[id]
		switch {
		case in == nil:
			return runtime.ErrNotFound
		case in.Phase == runtime.PhaseRunning:
			in.watchers = append(in.watchers, w)
		case in.Phase == runtime.PhaseExited:
			w.tell(*in.Exit)
		default:
			return &runtime.Error{Reason: runtime.ReasonRuntimeError,
				Message: fmt.Sprintf("instance %s is %s: it was not started", id, in.Phase)}
		}
		return nil
	}, nil)
	stop = func() {
		d.fake.mu.Lock()
		defer d.fake.mu.Unlock()
		w.ended = nil
	}
	if err != nil {
		stop()
		return nil, err
	}
	return stop, nil
}

// watcher is who watches an instance. The lock is held for all of it.
type watcher struct {
	daemon *Daemon
	ended  func(runtime.Exit) // nil once it was called, or must not be any more
}

func (w *watcher) tell(exit runtime.Exit) {
	if w.ended != nil && w.daemon.life.Err() == nil {
		w.ended(exit)
	}
	w.ended = nil
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
	var unknown error
	err = d.call(ctx, Call{Method: List, WorkspaceUID: uid}, func(ctx context.Context, _ *Call) error {
		if err := d.lock(ctx); err != nil {
			return err
		}
		defer d.fake.mu.Unlock()
		list, unknown = d.fake.list(uid)
		return nil
	}, nil)
	if err != nil {
		return nil, err
	}
	return list, unknown
}

// Foreign implements Runtime.
func (d *Daemon) Foreign(ctx context.Context) (foreign map[string]int, err error) {
	err = d.call(ctx, Call{Method: Foreign}, func(ctx context.Context, _ *Call) error {
		if err := d.lock(ctx); err != nil {
			return err
		}
		defer d.fake.mu.Unlock()
		foreign = maps.Clone(d.fake.foreign)
		return nil
	}, nil)
	if err != nil {
		return nil, err
	}
	return foreign, nil
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
