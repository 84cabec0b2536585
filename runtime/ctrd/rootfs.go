package ctrd

import (
	"context"
	"crypto/rand"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// rootfs is what the containers of an image have in common. An image's digest
// covers all of it, so it is found out once.
type rootfs struct {
	config ocispec.ImageConfig
	// parent is the snapshot of its layers.
	parent string
	// users are those that were looked up, by `user[:group]`; guarded by Driver.mu.
	users map[string]specs.User
}

// How much is kept: of so many images, and of each so many users.
const (
	maxRootfs = 256
	maxUsers  = 64
)

// rootfs returns what is known of the image, asking containerd the first time.
func (d *Driver) rootfs(ctx context.Context, image client.Image) (*rootfs, error) {
	if r := d.knownRootfs(image); r != nil {
		return r, nil
	}
	spec, err := image.Spec(ctx)
	if err != nil {
		return nil, err
	}
	r := &rootfs{config: spec.Config, parent: identity.ChainID(spec.RootFS.DiffIDs).String(), users: make(map[string]specs.User)}
	d.mu.Lock()
	defer d.mu.Unlock()
	makeRoom(d.images, maxRootfs)
	d.images[image.Target().Digest.String()] = r
	return r, nil
}

// knownRootfs asks nobody; nil if it is not known.
func (d *Driver) knownRootfs(image client.Image) *rootfs {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.images[image.Target().Digest.String()]
}

// makeRoom removes one of m's entries, any, if there are limit.
func makeRoom[V any](m map[string]V, limit int) {
	if len(m) < limit {
		return
	}
	for key := range m {
		delete(m, key)
		return
	}
}

// user returns who `user[:group]` is in the image, root when empty.
func (d *Driver) user(ctx context.Context, r *rootfs, name string) (user specs.User, err error) {
	if name == "" {
		name = "0"
	}
	d.mu.Lock()
	user, ok := r.users[name]
	d.mu.Unlock()
	if ok {
		return user, nil
	}
	err = d.step(ctx, stepUserFind, func(ctx context.Context) (err error) {
		user, err = d.findUser(ctx, r.parent, name)
		return err
	})
	if err != nil {
		return user, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	makeRoom(r.users, maxUsers)
	r.users[name] = user
	return user, nil
}

// findUser looks the user up in a view of the snapshot, which goes with the lease
// if it is not removed before.
func (d *Driver) findUser(ctx context.Context, parent, name string) (specs.User, error) {
	ctx, release, err := d.lease(ctx)
	if err != nil {
		return specs.User{}, err
	}
	defer release()
	service := d.client.SnapshotService(d.cfg.Snapshotter)
	key := "user-" + rand.Text()
	if err := ctx.Err(); err != nil {
		return specs.User{}, err
	}
	// A caller that goes away interrupts neither, or the view might appear after it
	// was removed.
	lasting, cancel := d.detached(ctx, d.deadlines.task)
	defer cancel()
	_, err = service.View(lasting, key, parent)
	defer func() {
		if err := service.Remove(lasting, key); err != nil && !errdefs.IsNotFound(err) {
			d.log.Warn("view of an image not removed, it goes with its lease", "view", key, "error", err)
		}
	}()
	if err != nil {
		return specs.User{}, err
	}
	view := &containers.Container{Snapshotter: d.cfg.Snapshotter, SnapshotKey: key}
	s := oci.Spec{Linux: &specs.Linux{}} // of this system
	if err := oci.WithUser(name)(ctx, d.client, view, &s); err != nil {
		return specs.User{}, userFailure(name, err)
	}
	base, group, _ := strings.Cut(name, ":")
	if group == "" {
		// Supplementary groups, as login would give them; with an explicit group
		// there are none.
		if n, err := strconv.ParseUint(base, 10, 32); err == nil {
			base = strconv.FormatUint(n, 10)
		}
		if err := oci.WithAdditionalGIDs(base)(ctx, d.client, view, &s); err != nil {
			return specs.User{}, userFailure(name, err)
		}
	}
	return s.Process.User, nil
}
