package runtimetest

import (
	"cmp"
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/workspaced/workspaced/runtime"
)

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
	if f.instances[spec.InstanceID] != nil {
		f.violation("Prepare of instance %s, which there is", spec.InstanceID)
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
	own := slices.DeleteFunc(slices.Clone(image.Env), func(kv string) bool {
		key, _, _ := strings.Cut(kv, "=")
		return slices.ContainsFunc(spec.Env, func(e string) bool { return strings.HasPrefix(e, key+"=") })
	})
	if err := checkTotal(stringBytes(own) + spec.LaunchBytes + stringBytes(argv)); err != nil {
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
			ID:          cmp.Or(spec.InstanceID, fmt.Sprintf("%s-%d", spec.WorkspaceID, f.numbers[spec.WorkspaceID])),
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
	switch spec.Profile {
	case "", runtime.ProfileRestricted, runtime.ProfileBaseline:
	default:
		if spec.Profile != runtime.ProfilePrivileged || !f.policy.AllowPrivileged {
			return notAllowed("security profile %q", spec.Profile)
		}
	}
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
		if m.HostPath != "" && !f.policy.AllowsHostPath(m.HostPath) {
			return notAllowed("host path %q", m.HostPath)
		}
		if m.HostPath != "" && f.missing[m.HostPath] {
			return &runtime.Error{Reason: runtime.ReasonVolume,
				Message: fmt.Sprintf("the host has no %q", m.HostPath)}
		}
	}
	return nil
}

func notAllowed(format string, args ...any) error {
	return &runtime.Error{Reason: runtime.ReasonNotAllowed, Message: "the settings do not allow " + fmt.Sprintf(format, args...)}
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
