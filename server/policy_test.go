package server_test

import (
	"testing"
	"testing/synctest"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/server/servertest"
)

const privileged = workspacev1.SecurityProfile_SECURITY_PROFILE_PRIVILEGED

func hostVolume(path string) *workspacev1.Volume {
	return &workspacev1.Volume{MountPath: "/host", Source: &workspacev1.Volume_HostPath{HostPath: path}}
}

// What a spec may ask of the machine is what the settings allow, in each call
// that takes one, and the refusal names the setting.
func TestPolicy(t *testing.T) {
	some := runtime.Policy{HostPaths: []string{"/srv/shared"}}
	for _, tt := range []struct {
		name            string
		policy          runtime.Policy
		edit            func(s *wsSpec)
		reason, setting string // empty: it is taken
	}{
		{"privileged", runtime.Policy{HostPaths: []string{"/"}}, func(s *wsSpec) { s.SecurityProfile = privileged }, server.ReasonPrivileged, "allow_privileged"},
		{"privileged, allowed", runtime.Policy{AllowPrivileged: true}, func(s *wsSpec) { s.SecurityProfile = privileged }, "", ""},
		{"baseline", runtime.Policy{}, func(s *wsSpec) { s.SecurityProfile = workspacev1.SecurityProfile_SECURITY_PROFILE_BASELINE }, "", ""},
		{"a host path", runtime.Policy{AllowPrivileged: true}, func(s *wsSpec) { s.Volumes = append(s.Volumes, hostVolume("/srv")) }, server.ReasonHostPath, "allowed_host_paths"},
		{"another host path", some, func(s *wsSpec) { s.Volumes = append(s.Volumes, volume("/data", "data"), hostVolume("/srv/shared-not")) }, server.ReasonHostPath, "allowed_host_paths"},
		{"what is allowed lies in it", some, func(s *wsSpec) { s.Volumes = append(s.Volumes, hostVolume("/srv")) }, server.ReasonHostPath, "allowed_host_paths"},
		{"an allowed host path", some, func(s *wsSpec) { s.Volumes = append(s.Volumes, hostVolume("/srv/shared")) }, "", ""},
		{"below an allowed host path", some, func(s *wsSpec) { s.Volumes = append(s.Volumes, hostVolume("/srv/shared/team/a")) }, "", ""},
		{"below a root that is allowed", runtime.Policy{HostPaths: []string{"/"}}, func(s *wsSpec) { s.Volumes = append(s.Volumes, hostVolume("/etc")) }, "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run(t, func(t *testing.T, h *harness) {
				before := h.create("old")
				spec := spec()
				tt.edit(spec)
				_, createErr := h.Client.CreateWorkspace(h.ctx(), &createReq{WorkspaceId: "new", Workspace: &ws{Spec: spec}})
				_, updateErr := h.Client.UpdateWorkspace(h.ctx(), &updateReq{
					Workspace: &ws{Name: "workspaces/old", Spec: spec}, UpdateMask: mask("spec"),
				})
				for name, err := range map[string]error{"workspaces/new": createErr, "workspaces/old": updateErr} {
					if tt.reason == "" {
						if err != nil {
							t.Errorf("%s: %v", name, err)
						}
						continue
					}
					wantCode(t, err, codes.FailedPrecondition, tt.reason)
					info := detail[*errdetails.ErrorInfo](err)
					if info.GetMetadata()["setting"] != tt.setting || info.GetMetadata()["resource"] != name {
						t.Errorf("%s: %v does not name the setting and the workspace", name, info)
					}
				}
				synctest.Wait()
				if after := h.get("workspaces/old"); tt.reason != "" && after.GetEtag() != before.GetEtag() {
					t.Errorf("a refused change changed %v", after)
				}
			}, servertest.WithPolicy(tt.policy))
		})
	}
}

// Privileged is the machine's root: for an admin of everything, and for nobody
// whose rights end somewhere, also where the settings allow it.
func TestPolicy_PrivilegedNeedsAnAdmin(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("old", func(req *createReq) { req.Workspace.Spec.SecurityProfile = privileged })
		for _, grant := range []access.Grant{
			{Roles: access.RolesOf(workspacev1.Role_ROLE_OPERATOR, workspacev1.Role_ROLE_SECRET_WRITER)},
			{Roles: access.RolesOf(workspacev1.Role_ROLE_ADMIN), Scope: access.Scope{Workspaces: "o*"}},
		} {
			c := must2(h.As(access.Subject{Name: "test", Grants: []access.Grant{grant}}))(t)
			asks := spec()
			asks.SecurityProfile = privileged
			_, err := c.Client.CreateWorkspace(h.ctx(), &createReq{WorkspaceId: "other", Workspace: &ws{Spec: asks}})
			wantCode(t, err, codes.PermissionDenied, "")
			update := func(spec *wsSpec, path string) error {
				_, err := c.Client.UpdateWorkspace(h.ctx(), &updateReq{Workspace: &ws{Name: "workspaces/old", Spec: spec}, UpdateMask: mask(path)})
				return err
			}
			// What runs in there is up to the admin too.
			wantCode(t, update(&wsSpec{Args: []string{"x"}}, "spec.args"), codes.PermissionDenied, "")
			if err := update(&wsSpec{}, "spec.security_profile"); err != nil {
				t.Errorf("%v can't take it back: %v", grant, err)
			}
			wantCode(t, update(asks, "spec.security_profile"), codes.PermissionDenied, "")
			// For the next round.
			must2(h.Client.UpdateWorkspace(h.ctx(), &updateReq{Workspace: &ws{Name: "workspaces/old", Spec: asks}, UpdateMask: mask("spec.security_profile")}))(t)
		}
	})
}

// A workspace that has more than the settings allow now, which they did once, can
// be brought back, and all but its spec be changed; its container runs on, and no
// other one is made.
func TestPolicy_TakenBack(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		w := h.create("w", func(req *createReq) { req.Workspace.Spec.SecurityProfile = privileged })
		h.SetPolicy(runtime.Policy{})
		if err := h.Restart(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if now := h.get("workspaces/w"); now.GetContainerId() != w.GetContainerId() || now.GetReconciling() {
			t.Errorf("the container did not just run on: %v", now)
		}
		update := func(to *ws, paths ...string) error {
			to.Name = "workspaces/w"
			_, err := h.Client.UpdateWorkspace(h.ctx(), &updateReq{Workspace: to, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths}})
			return err
		}
		if err := update(&ws{Labels: map[string]string{"a": "b"}}, "labels"); err != nil {
			t.Errorf("labels: %v", err)
		}
		wantCode(t, update(&ws{Spec: &wsSpec{Args: []string{"x"}}}, "spec.args"), codes.FailedPrecondition, server.ReasonPrivileged)

		h.set("workspaces/w/secrets/KEY", "value")
		synctest.Wait()
		now := h.get("workspaces/w")
		if now.GetState() != workspacev1.WorkspaceState_WORKSPACE_STATE_DEGRADED || now.GetLastError().GetReason() != string(runtime.ReasonNotAllowed) || now.GetContainerId() != w.GetContainerId() {
			t.Errorf("a privileged container was made, or the old one is gone: %v", now)
		}
		if err := update(&ws{Spec: &wsSpec{}}, "spec.security_profile"); err != nil {
			t.Errorf("back to the default: %v", err)
		}
		h.WaitGeneration("w", 0)
		if l := h.Runtime.Launches("w"); l[len(l)-1].Spec.Profile != "" {
			t.Errorf("the new container has profile %q", l[len(l)-1].Spec.Profile)
		}
	})
}

// The profile is part of what a container is: another one is a new generation,
// and the default by its name is none.
func TestSecurityProfileMakesAGeneration(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		h.create("w")
		for _, tt := range []struct {
			to         workspacev1.SecurityProfile
			generation int64
			runs       runtime.Profile
		}{
			{workspacev1.SecurityProfile_SECURITY_PROFILE_RESTRICTED, 1, ""},
			{workspacev1.SecurityProfile_SECURITY_PROFILE_BASELINE, 2, runtime.ProfileBaseline},
			{privileged, 3, runtime.ProfilePrivileged},
			{workspacev1.SecurityProfile_SECURITY_PROFILE_UNSPECIFIED, 4, ""},
		} {
			resp := must2(h.Client.UpdateWorkspace(h.ctx(), &updateReq{
				Workspace: &ws{Name: "workspaces/w", Spec: &wsSpec{SecurityProfile: tt.to}}, UpdateMask: mask("spec.security_profile"),
			}))(t)
			if resp.GetGeneration() != tt.generation || resp.GetWorkspace().GetSpec().GetSecurityProfile() != tt.to {
				t.Errorf("%v: %v", tt.to, resp)
			}
			synctest.Wait()
			if l := h.Runtime.Launches("w"); int64(len(l)) != tt.generation || l[len(l)-1].Spec.Profile != tt.runs {
				t.Errorf("%v: %d containers were started, the last one with %q", tt.to, len(l), l[len(l)-1].Spec.Profile)
			}
		}
	})
}
