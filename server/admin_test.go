package server_test

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

func TestGetServerInfo(t *testing.T) {
	run(t, func(t *testing.T, h *harness) {
		info := func() *workspacev1.GetServerInfoResponse {
			return must2(h.Admin.GetServerInfo(h.ctx(), &workspacev1.GetServerInfoRequest{}))(t)
		}
		before := info()
		if before.GetVersion() != "test" || before.GetDatabaseUid() == "" || !before.GetStartTime().AsTime().Equal(time.Now()) {
			t.Errorf("got %v", before)
		}
		advance(time.Hour)
		h.Restart()
		after := info()
		if after.GetDatabaseUid() != before.GetDatabaseUid() || after.GetStartTime().AsTime().Sub(before.GetStartTime().AsTime()) < time.Hour {
			t.Errorf("after a restart: got %v, before %v", after, before)
		}
	})
}

// Each RPC says who may call it.
func TestEveryRPCDeclaresItsAccess(t *testing.T) {
	for _, file := range []protoreflect.FileDescriptor{
		workspacev1.File_workspace_v1_workspace_control_proto, workspacev1.File_workspace_v1_admin_control_proto,
	} {
		for i := range file.Services().Len() {
			methods := file.Services().Get(i).Methods()
			for j := range methods.Len() {
				options, _ := methods.Get(j).Options().(*descriptorpb.MethodOptions)
				access, _ := proto.GetExtension(options, workspacev1.E_Access).(*workspacev1.Access)
				if len(access.GetRoles()) == 0 {
					t.Errorf("%s declares no role", methods.Get(j).FullName())
				}
			}
		}
	}
}
