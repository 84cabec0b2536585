package ctrd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/workspaced/workspaced/runtime"
)

// runtimeName is containerd's shim for runc and its likes.
const runtimeName = "io.containerd.runc.v2"

// Prepare makes a standby instance; see server/workspace.Runtime.
func (d *Driver) Prepare(ctx context.Context, spec runtime.Spec) (runtime.Instance, error) {
	if !workspaceID.MatchString(spec.WorkspaceID) {
		return runtime.Instance{}, &runtime.Error{Reason: runtime.ReasonRuntimeError, Message: fmt.Sprintf("%q is no workspace id", spec.WorkspaceID), Permanent: true}
	}
	if !workspaceUID.MatchString(spec.WorkspaceUID) {
		return runtime.Instance{}, &runtime.Error{Reason: runtime.ReasonRuntimeError, Message: fmt.Sprintf("%q is no workspace uid", spec.WorkspaceUID), Permanent: true}
	}
	if spec.InstanceID != "" && !instanceID.MatchString(spec.InstanceID) {
		return runtime.Instance{}, &runtime.Error{Reason: runtime.ReasonRuntimeError, Message: fmt.Sprintf("%q is no instance id", spec.InstanceID), Permanent: true}
	}
	if d.ctx.Err() != nil {
		return runtime.Instance{}, errClosed
	}
	ctx, cancel := d.bound(ctx, d.deadlines.prepare)
	defer cancel()
	rec := &record{
		ID:                 cmp.Or(spec.InstanceID, runtime.NewInstanceID(spec.WorkspaceID)),
		WorkspaceID:        spec.WorkspaceID,
		WorkspaceUID:       spec.WorkspaceUID,
		PreparedGeneration: spec.Generation,
		CreateTime:         time.Now(),
		Snapshotter:        d.cfg.Snapshotter,
		Init:               d.initID,
	}
	prepared := false
	defer func() {
		if !prepared {
			d.discard(ctx, rec.WorkspaceUID, rec.ID)
		}
	}()
	s, err := d.prepare(ctx, spec, rec)
	if err != nil {
		return runtime.Instance{}, failure(ctx, "preparing the container", err)
	}
	if err := d.addStandby(rec.ID, s); err != nil {
		s.close()
		return runtime.Instance{}, err
	}
	prepared = true
	return rec.instance(runtime.PhaseStandby), nil
}

// discard removes an instance that did not come to be. What can't be removed now,
// List reports as a remnant, also what containerd may finish only after its caller
// has gone: the next List asks it again.
func (d *Driver) discard(ctx context.Context, uid, id string) {
	defer d.forgetRecorded(uid)
	ctx, cancel := d.detached(ctx, d.deadlines.remove)
	defer cancel()
	if err := d.Remove(ctx, id); err != nil {
		d.log.Warn("half-made instance not removed", "instance", id, "error", err)
	}
}

func (d *Driver) prepare(ctx context.Context, spec runtime.Spec, rec *record) (_ *standby, err error) {
	if err := d.checkProfile(spec.Profile); err != nil {
		return nil, err
	}
	image, root, err := d.image(ctx, spec.Image)
	if err != nil {
		return nil, err
	}
	config := root.config
	argv, err := command(spec, config)
	if err != nil {
		return nil, err
	}
	if err := checkEnv(mergeEnv(config.Env, spec.Env), argv); err != nil {
		return nil, err
	}
	if err := checkLaunch(spec, config.Env, argv); err != nil {
		return nil, err
	}
	rec.ImageDigest = image.Target().Digest.String()

	s := &standby{dir: d.ioDir(rec.WorkspaceUID, rec.ID), record: rec, imageEnv: config.Env, argv: argv, placed: true}
	var volumes mounted
	prepared := false
	defer func() {
		volumes.close()
		if !prepared {
			s.close()
			volumes.unmake()
		}
	}()

	// From here on there is something to remove, and it can be found.
	err = d.step(ctx, stepInstanceMake, func(context.Context) error {
		if err := d.makeInstanceDir(rec.WorkspaceUID, rec.ID); err != nil || !spec.API {
			return err
		}
		return errors.Join(
			os.MkdirAll(d.cfg.APIDir, 0o755),
			os.Mkdir(filepath.Join(d.ioDir(rec.WorkspaceUID, rec.ID), filepath.Base(runtime.APIDir)), 0o755),
		)
	})
	if err != nil {
		return nil, err
	}
	err = d.step(ctx, stepRecordCreate, func(context.Context) error {
		return errors.Join(d.writeRecord(rec), d.makeReserve(rec, spec))
	})
	if err != nil {
		return nil, err
	}
	var log string
	err = d.step(ctx, stepLogMake, func(context.Context) (err error) {
		log, err = d.logPath(spec.WorkspaceID)
		return err
	})
	if err != nil {
		return nil, err
	}
	err = d.step(ctx, stepVolumesMake, func(context.Context) (err error) {
		volumes, err = d.mounts(spec)
		return err
	})
	if err != nil {
		return nil, err
	}

	name := spec.User
	if name == "" {
		name = config.User
	}
	user, err := d.user(ctx, root, name)
	if err != nil {
		return nil, err
	}
	opts := d.specOpts(spec, rec.ID, config, argv, volumes.mounts, user)
	if err := d.createContainer(ctx, rec, image.Name(), opts); err != nil {
		return nil, err
	}
	var mounts []mount.Mount
	err = d.step(ctx, stepSnapshotPrepare, func(ctx context.Context) (err error) {
		mounts, err = d.client.SnapshotService(d.cfg.Snapshotter).Prepare(ctx, rec.ID, root.parent)
		return err
	})
	if err != nil {
		return nil, err
	}
	err = d.step(ctx, stepVolumesOwn, func(context.Context) error { return own(volumes.unowned, user) })
	if err != nil {
		return nil, err
	}
	err = d.step(ctx, stepFilesMake, func(context.Context) error {
		return makeFilesDir(d.filesDir(rec.WorkspaceUID, rec.ID), user)
	})
	if err != nil {
		return nil, err
	}
	err = d.step(ctx, stepFIFOMake, func(context.Context) error { return s.makeFIFOs(user) })
	if err != nil {
		return nil, err
	}
	if err := d.startTask(ctx, mounts, log, s); err != nil {
		return nil, err
	}
	if err := d.awaitReady(ctx, s, spec.Resources); err != nil {
		return nil, err
	}
	if err := checkHostMounts(s.record.PID, volumes.host); err != nil {
		return nil, err
	}
	prepared = true
	return s, nil
}

// createContainer makes containerd's record of the container. It names the
// snapshot that is made after it: so containerd's garbage collector keeps that
// from its first moment, without a lease.
func (d *Driver) createContainer(ctx context.Context, rec *record, image string, opts []oci.SpecOpts) error {
	c := containers.Container{
		ID: rec.ID,
		Labels: map[string]string{
			labelInstanceUID:  d.cfg.InstanceUID,
			labelWorkspaceID:  rec.WorkspaceID,
			labelWorkspaceUID: rec.WorkspaceUID,
			labelGeneration:   strconv.FormatInt(rec.PreparedGeneration, 10),
			labelImageDigest:  rec.ImageDigest,
		},
		Image:       image,
		Snapshotter: rec.Snapshotter,
		SnapshotKey: rec.ID,
	}
	for _, opt := range []client.NewContainerOpts{
		client.WithRuntime(runtimeName, &options.Options{Root: d.runcRoot, BinaryName: d.cfg.RuntimeBinary}),
		client.WithNewSpec(opts...),
	} {
		if err := opt(ctx, d.client, &c); err != nil {
			return err
		}
	}
	return d.step(ctx, stepContainerCreate, func(ctx context.Context) error {
		_, err := d.client.ContainerService().Create(ctx, c)
		return err
	})
}

// startTask starts workspace-init and opens its pidfd. A caller that goes away
// does not interrupt containerd in the middle of it, which might leave a task
// that appears after we looked for what is to be removed.
func (d *Driver) startTask(ctx context.Context, mounts []mount.Mount, log string, s *standby) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	output, err := cio.LogURIGenerator("file", log, nil)
	if err != nil {
		return err
	}
	ctx, cancel := d.detached(ctx, d.deadlines.task)
	defer cancel()
	service, id, pid := d.client.TaskService(), s.record.ID, 0
	err = d.step(ctx, stepTaskCreate, func(ctx context.Context) error {
		_, err := service.Create(ctx, &tasks.CreateTaskRequest{
			ContainerID: id, Rootfs: mount.ToProto(mounts), Stdout: output.String(), Stderr: output.String(),
		})
		return errgrpc.ToNative(err)
	})
	if err != nil {
		return failure(ctx, "creating the container", err)
	}
	err = d.step(ctx, stepTaskStart, func(ctx context.Context) error {
		res, err := service.Start(ctx, &tasks.StartRequest{ContainerID: id})
		pid = int(res.GetPid())
		return errgrpc.ToNative(err)
	})
	if err != nil {
		return failure(ctx, "starting the container", err)
	}
	start, err := startTime(pid)
	if err == nil {
		s.process, err = d.openProcess(ctx, pid, start)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if s.process == nil {
		return nil // it has ended already; what it reported is still to be read
	}
	s.record.PID, s.record.PIDStart = pid, start
	return d.step(ctx, stepRecordProcess, func(context.Context) error { return d.writeRecord(s.record) })
}

// instance is what the record says.
func (r *record) instance(phase runtime.Phase) runtime.Instance {
	i := runtime.Instance{
		ID:                 r.ID,
		WorkspaceID:        r.WorkspaceID,
		WorkspaceUID:       r.WorkspaceUID,
		Phase:              phase,
		PreparedGeneration: r.PreparedGeneration,
		ImageDigest:        r.ImageDigest,
		Stopped:            r.Stopping,
	}
	if r.Launch != nil {
		i.Generation, i.StartTime = r.Launch.Generation, r.Launch.StartTime
		i.SecretVersions, i.GlobalSecrets = r.Launch.SecretVersions, r.Launch.GlobalSecrets
	}
	if phase == runtime.PhaseStandby || phase == runtime.PhaseRunning {
		i.PID = r.PID
	}
	return i
}

func limitsHint(r runtime.Resources) string {
	var hints []string
	if r.MemoryBytes > 0 {
		hints = append(hints, fmt.Sprintf("memory limit %d bytes", r.MemoryBytes))
	}
	if r.Pids > 0 {
		hints = append(hints, fmt.Sprintf("limit of %d processes", r.Pids))
	}
	if hints == nil {
		return ""
	}
	return " (" + strings.Join(hints, ", ") + ": too small?)"
}
