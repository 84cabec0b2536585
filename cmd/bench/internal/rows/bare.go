package rows

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd/handshake"
)

// bare is a container that is restarted as whoever has no workspaced would do it
// with containerd's client: stopped, removed, made and started again, with the
// secrets in its environment. But for our first process and its mounts it is made
// as ours are.
type bare struct {
	m       *machine
	client  *client.Client
	image   client.Image
	model   containers.Container // of ours
	spec    specs.Spec
	file    string // of the probe's records
	secrets int

	generation int
	container  client.Container
	task       client.Task
}

// newBare starts one that is made like the workspace's container. Its probe
// writes to the file.
func (m *machine) newBare(ctx context.Context, workspace, file string, secrets int) (_ *bare, err error) {
	b := &bare{m: m, file: file, secrets: secrets}
	w, err := m.store.Workspace(workspace)
	if err != nil {
		return nil, err
	}
	if b.client, err = client.New(m.containerd.Address(), client.WithDefaultNamespace(m.namespace)); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close(ctx))
		}
	}()
	ours, err := b.client.LoadContainer(ctx, w.Status.Running.InstanceID)
	if err != nil {
		return nil, err
	}
	if b.model, err = ours.Info(ctx); err != nil {
		return nil, err
	}
	if b.image, err = ours.Image(ctx); err != nil {
		return nil, err
	}
	spec, err := ours.Spec(ctx)
	if err != nil {
		return nil, err
	}
	b.spec = *spec
	b.spec.Mounts = nil
	for _, mount := range spec.Mounts {
		switch mount.Destination {
		case handshake.Dir, handshake.InitPath, runtime.FilesDir: // the model's own
		default:
			b.spec.Mounts = append(b.spec.Mounts, mount)
		}
	}
	return b, b.start(ctx)
}

// restart stops the container and starts it again.
func (b *bare) restart(ctx context.Context) error {
	if err := b.stop(ctx); err != nil {
		return err
	}
	return b.start(ctx)
}

// start makes and starts the container.
func (b *bare) start(ctx context.Context) (err error) {
	b.generation++
	id := fmt.Sprintf("%s-%d", b.file, b.generation)
	spec := b.spec
	process, linux := *spec.Process, *spec.Linux
	spec.Process, spec.Linux = &process, &linux
	process.Args = []string{"/" + probeProgram, filepath.Join(probeMount, b.file)}
	process.Env = []string{"WORKSPACE_GENERATION=" + strconv.Itoa(b.generation)}
	for _, s := range secretsOf(b.secrets) {
		process.Env = append(process.Env, s.Key+"="+s.Value.Reveal())
	}
	linux.CgroupsPath = filepath.Join("/", b.m.namespace, id)
	b.container, err = b.client.NewContainer(ctx, id,
		client.WithImageName(b.image.Name()),
		client.WithSnapshotter(b.model.Snapshotter),
		client.WithNewSnapshot(id, b.image),
		func(_ context.Context, _ *client.Client, c *containers.Container) error {
			c.Runtime = b.model.Runtime
			return nil
		},
		client.WithSpec(&spec, func(context.Context, oci.Client, *containers.Container, *oci.Spec) error { return nil }),
	)
	if err != nil {
		return err
	}
	if b.task, err = b.container.NewTask(ctx, cio.LogFile(filepath.Join(b.m.dir, b.file+".log"))); err != nil {
		return err
	}
	return b.task.Start(ctx)
}

// stop ends and removes the container, as far as there is one.
func (b *bare) stop(ctx context.Context) error {
	if b.task != nil {
		ended, err := b.task.Wait(ctx)
		if err != nil {
			return err
		}
		if err := b.task.Kill(ctx, syscall.SIGTERM); err != nil {
			return err
		}
		select {
		case status := <-ended:
			if err := status.Error(); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
		if _, err := b.task.Delete(ctx); err != nil {
			return err
		}
		b.task = nil
	}
	if b.container != nil {
		if err := b.container.Delete(ctx, client.WithSnapshotCleanup); err != nil {
			return err
		}
		b.container = nil
	}
	return nil
}

// close removes the container, and lets go of containerd.
func (b *bare) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTimeout)
	defer cancel()
	return errors.Join(b.stop(ctx), b.client.Close())
}
