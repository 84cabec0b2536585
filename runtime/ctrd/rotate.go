package ctrd

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"github.com/workspaced/workspaced/runtime"
)

// Rotate replaces a running instance's files; see server/workspace.Runtime. Nothing
// is asked of containerd. The record comes last: a daemon that dies before it
// leaves an instance that does not have the generation yet, and the next one does
// all of it again, the signal too.
func (d *Driver) Rotate(ctx context.Context, id string, rotation runtime.Rotation) (runtime.Instance, error) {
	ctx, cancel := d.bound(ctx, d.deadlines.start)
	defer cancel()
	in, err := d.rotate(ctx, id, rotation)
	if errors.Is(err, runtime.ErrNotFound) || errors.Is(err, runtime.ErrNotRunning) {
		return in, err
	}
	return in, failure(ctx, "changing the container's files", err)
}

func (d *Driver) rotate(ctx context.Context, id string, rotation runtime.Rotation) (runtime.Instance, error) {
	rec, err := d.findRecord(ctx, id)
	switch {
	case err != nil:
		return runtime.Instance{}, err
	case rec == nil:
		return runtime.Instance{}, noFiles("it is not known with what the container was started")
	case rec.Launch == nil || rec.PID == 0 || d.holds(id):
		return runtime.Instance{}, runtime.ErrNotRunning
	}
	if err := checkFiles(rotation.Files, rotation.Keep); err != nil {
		return runtime.Instance{}, err
	}
	p, err := d.openProcess(ctx, rec.PID, rec.PIDStart)
	if err != nil {
		return runtime.Instance{}, err
	}
	if p == nil {
		return runtime.Instance{}, runtime.ErrNotRunning
	}
	defer p.close()
	if p.ended() {
		return runtime.Instance{}, runtime.ErrNotRunning
	}
	if rec.Launch.Generation >= rotation.Generation {
		return rec.instance(runtime.PhaseRunning), nil
	}
	if _, err := os.Lstat(d.filesDir(rec.WorkspaceUID, rec.ID)); errors.Is(err, os.ErrNotExist) {
		return runtime.Instance{}, noFiles("the container was started by an older version, which knew no files")
	}
	names, err := d.putFiles(ctx, rec, rotation.Files, rotation.Keep)
	if err != nil {
		return runtime.Instance{}, err
	}
	if rotation.Signal != 0 {
		err := d.step(ctx, stepLiveSignal, func(context.Context) error { return p.signal(rotation.Signal) })
		if err != nil {
			return runtime.Instance{}, err
		}
	}
	written, err := d.updateRecord(ctx, stepRecordRotate, rec, func(r *record) {
		launch := *r.Launch
		launch.Generation, launch.Files = rotation.Generation, names
		launch.SecretVersions = versionsAfter(r.Launch, &rotation)
		launch.GlobalSecrets = rotation.GlobalsAfter(r.Launch.GlobalSecrets, launch.SecretVersions)
		r.Launch = &launch
	})
	switch {
	case err != nil:
		return runtime.Instance{}, err
	case written == nil:
		return runtime.Instance{}, fmt.Errorf("instance %s has no record any more", id)
	}
	return written.instance(runtime.PhaseRunning), nil
}

// versionsAfter are the versions that an instance has after a rotation: those of the
// new files, and of what is no file or was kept.
func versionsAfter(before *launchRecord, rotation *runtime.Rotation) map[string]int64 {
	versions := make(map[string]int64, len(before.SecretVersions))
	for key, version := range before.SecretVersions {
		if !slices.Contains(before.Files, key) || slices.Contains(rotation.Keep, key) {
			versions[key] = version
		}
	}
	maps.Copy(versions, rotation.SecretVersions)
	return versions
}

func noFiles(why string) error {
	return &runtime.Error{Reason: runtime.ReasonRuntimeError, Message: "its files can't be changed: " + why, Permanent: true}
}
