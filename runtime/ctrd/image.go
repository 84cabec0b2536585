package ctrd

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/workspaced/workspaced/runtime"
)

// normalize makes the name under which containerd keeps the image:
// "redis" is "docker.io/library/redis:latest".
func normalize(ref string) (string, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return "", &runtime.Error{
			Reason: runtime.ReasonImageInvalid, Message: fmt.Sprintf("%.100q is no image reference: %s", ref, short(err)), Permanent: true, Err: err,
		}
	}
	return named.String(), nil
}

// EnsureImage makes the image present and unpacked, and returns the digest of
// what the reference names. An image that is there is not looked for in its
// registry. Concurrent calls for one image share a pull, which ends when all
// of them have gone.
func (d *Driver) EnsureImage(ctx context.Context, ref string) (string, error) {
	name, err := normalize(ref)
	if err != nil {
		return "", err
	}
	digest, err := d.pulls.do(ctx, d.ctx, name, func(ctx context.Context) (digest string, err error) {
		err = d.guard(fmt.Sprintf("the pull of image %q", ref), func() (err error) {
			digest, err = d.ensureImage(ctx, ref, name)
			return err
		})
		return digest, err
	})
	if err != nil {
		return "", failure(ctx, fmt.Sprintf("image %q", ref), err)
	}
	return digest, nil
}

func (d *Driver) ensureImage(ctx context.Context, ref, name string) (string, error) {
	ctx, cancel := d.bound(ctx, d.deadlines.pull)
	defer cancel()
	image, err := d.getImage(ctx, name)
	if err == nil && d.present(ctx, image) {
		return image.Target().Digest.String(), nil
	}
	ctx, release, leaseErr := d.lease(ctx)
	if leaseErr != nil {
		return "", failure(ctx, fmt.Sprintf("image %q", ref), leaseErr)
	}
	defer release()

	if err == nil {
		if err = d.unpack(ctx, image); err == nil {
			return image.Target().Digest.String(), nil
		}
		// Its content may be incomplete: a removed blob, a part of an image that was
		// imported. Its registry may have the rest.
		if !errdefs.IsNotFound(err) || mismatch(err) {
			return "", imageFailure(ctx, ref, err)
		}
	} else if !errdefs.IsNotFound(err) {
		return "", failure(ctx, fmt.Sprintf("image %q", ref), err)
	}

	resolver, err := d.cfg.Registries.resolver(ctx)
	if err != nil {
		return "", &runtime.Error{Reason: runtime.ReasonImagePullFailed, Message: fmt.Sprintf("image %q: %v", ref, err), Err: err}
	}
	staged := &stagedResolver{Resolver: resolver, driver: d}
	err = d.step(ctx, stepImageFetch, func(ctx context.Context) (err error) {
		image, err = d.client.Pull(ctx, name,
			client.WithResolver(staged),
			client.WithPullUnpack,
			client.WithPullSnapshotter(d.cfg.Snapshotter))
		return err
	})
	if err != nil {
		if !staged.resolved && errdefs.IsNotFound(err) {
			return "", notFound(ref, err)
		}
		return "", imageFailure(ctx, ref, err)
	}
	// A manifest for another platform is only seen now.
	if err := d.unpack(ctx, image); err != nil {
		return "", imageFailure(ctx, ref, err)
	}
	return image.Target().Digest.String(), nil
}

// present tells whether nothing has to be made for an image that was present
// before: its snapshot is there still. It takes no lease, which is two writes of
// containerd's to a disk.
func (d *Driver) present(ctx context.Context, image client.Image) bool {
	r := d.knownRootfs(image)
	if r == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, d.deadlines.unpack)
	defer cancel()
	err := d.step(ctx, stepSnapshotStat, func(ctx context.Context) error {
		_, err := d.client.SnapshotService(d.cfg.Snapshotter).Stat(ctx, r.parent)
		return err
	})
	return err == nil // if it can't be asked, what follows says why
}

// stagedResolver tells an image that the registry does not know from one whose
// parts it does not have.
type stagedResolver struct {
	remotes.Resolver
	driver   *Driver
	resolved bool // written before the fetch begins, read after the pull
}

func (r *stagedResolver) Resolve(ctx context.Context, ref string) (name string, desc ocispec.Descriptor, err error) {
	err = r.driver.step(ctx, stepImageResolve, func(ctx context.Context) (err error) {
		name, desc, err = r.Resolver.Resolve(ctx, ref)
		return err
	})
	r.resolved = r.resolved || err == nil
	return name, desc, err
}

func (d *Driver) getImage(ctx context.Context, name string) (image client.Image, err error) {
	err = d.step(ctx, stepImageGet, func(ctx context.Context) (err error) {
		image, err = d.client.GetImage(ctx, name)
		return err
	})
	return image, err
}

// unpack makes the image's snapshot, unless it is there. It also sees whether an
// image of several platforms has one for this machine. What an image of a single
// platform says of itself does not count: builders get it wrong, and
// workspace-init looks at the command itself.
func (d *Driver) unpack(ctx context.Context, image client.Image) error {
	ctx, cancel := context.WithTimeout(ctx, d.deadlines.unpack)
	defer cancel()
	return d.step(ctx, stepImageUnpack, func(ctx context.Context) error {
		unpacked, err := image.IsUnpacked(ctx, d.cfg.Snapshotter)
		if err == nil && !unpacked {
			err = image.Unpack(ctx, d.cfg.Snapshotter)
		}
		if err != nil {
			return err
		}
		_, err = d.rootfs(ctx, image)
		return err
	})
}

// ImportFile imports the images of a tar file, as ImportImage does.
func (d *Driver) ImportFile(ctx context.Context, path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, &runtime.Error{Reason: runtime.ReasonImageInvalid, Message: "image file: " + err.Error(), Err: err}
	}
	defer f.Close()
	return d.ImportImage(ctx, f)
}

// ImportImage imports the images of an OCI layout's or `docker save`'s tar
// stream, unpacks them, and returns their names.
func (d *Driver) ImportImage(ctx context.Context, tar io.Reader) ([]string, error) {
	ctx, cancel := d.bound(ctx, d.deadlines.pull)
	defer cancel()
	ctx, release, err := d.lease(ctx)
	if err != nil {
		return nil, failure(ctx, "import", err)
	}
	defer release()
	var imported []images.Image
	err = d.step(ctx, stepImageImport, func(ctx context.Context) (err error) {
		imported, err = d.client.Import(ctx, tar)
		return err
	})
	if err != nil {
		return nil, imageFailure(ctx, "in the archive", err)
	}
	if len(imported) == 0 {
		return nil, &runtime.Error{Reason: runtime.ReasonImageInvalid, Message: "the archive names no image", Permanent: true}
	}
	names := make([]string, 0, len(imported))
	for _, img := range imported {
		if err := d.unpack(ctx, client.NewImage(d.client, img)); err != nil {
			return nil, imageFailure(ctx, img.Name, err)
		}
		names = append(names, img.Name)
	}
	return names, nil
}

// image returns a present image, for Prepare.
func (d *Driver) image(ctx context.Context, ref string) (client.Image, *rootfs, error) {
	name, err := normalize(ref)
	if err != nil {
		return nil, nil, err
	}
	image, err := d.getImage(ctx, name)
	if errdefs.IsNotFound(err) {
		return nil, nil, &runtime.Error{
			Reason: runtime.ReasonImageNotFound, Message: fmt.Sprintf("image %q is not present any more", ref), Err: err,
		}
	} else if err != nil {
		return nil, nil, failure(ctx, fmt.Sprintf("image %q", ref), err)
	}
	r, err := d.rootfs(ctx, image)
	if err != nil {
		return nil, nil, imageFailure(ctx, ref, err)
	}
	return image, r, nil
}

func notFound(ref string, err error) error {
	return &runtime.Error{Reason: runtime.ReasonImageNotFound, Message: fmt.Sprintf("the registry knows no image %q", ref), Err: err}
}

// mismatch tells the error that containerd gives for a manifest of another
// platform. It has no type of its own.
func mismatch(err error) bool {
	return errdefs.IsNotFound(err) && containsAny(err, "no match for platform")
}
