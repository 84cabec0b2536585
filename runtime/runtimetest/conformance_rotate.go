package runtimetest

import (
	"errors"
	"maps"
	"slices"

	"github.com/workspaced/workspaced/runtime"
)

func (s *suite) rotate(id string, rotation runtime.Rotation) runtime.Instance {
	s.Helper()
	in, err := s.r.Rotate(s.ctx, id, rotation)
	if err != nil {
		s.Fatalf("Rotate(%s) to generation %d: %v", id, rotation.Generation, err)
	}
	return in
}

// wantFiles checks that these are all files that the instance has of those that
// the tests of rotations use.
func (s *suite) wantFiles(in runtime.Instance, want map[string]string) {
	s.Helper()
	if s.w.ReadFile == nil {
		return
	}
	for _, name := range []string{"A", "B", "C", "D", "NONE"} {
		if content, ok := want[name]; ok {
			s.wantFile(in, runtime.FilesDir+"/"+name, content)
		} else {
			s.wantNoFile(in, runtime.FilesDir+"/"+name)
		}
	}
}

// someFiles are A, B and C with this content.
func someFiles(content string) (files []runtime.File) {
	for _, name := range []string{"A", "B", "C"} {
		files = append(files, runtime.File{Name: name, Data: []byte(content)})
	}
	return files
}

var rotateProperties = []property{
	{"what runs takes in other files and goes on", func(s *suite) {
		in := s.start(s.prepare(s.spec("a", 1)).ID, runtime.Launch{
			Generation: 1, SecretVersions: map[string]int64{"A": 1, "B": 1, "C": 1, "ENV": 7}, Env: []string{"ENV=x"}, Files: someFiles("1"),
			GlobalSecrets: []string{"A", "B", "C", "ENV"},
		})
		rotated := s.rotate(in.ID, runtime.Rotation{
			Generation: 3, SecretVersions: map[string]int64{"A": 2, "D": 1}, GlobalSecrets: []string{"D"}, Keep: []string{"B", "NONE", "ENV"},
			Files: []runtime.File{{Name: "A", Data: []byte("2\x00")}, {Name: "D"}},
		})
		want := in
		want.Generation, want.SecretVersions = 3, map[string]int64{"A": 2, "B": 1, "D": 1, "ENV": 7}
		want.GlobalSecrets = []string{"B", "D", "ENV"} // A and C are own ones, or gone
		s.wantSame(want)
		if rotated.Phase != runtime.PhaseRunning || rotated.Generation != 3 || !maps.Equal(rotated.SecretVersions, want.SecretVersions) || !slices.Equal(rotated.GlobalSecrets, want.GlobalSecrets) {
			s.Errorf("Rotate = %+v, want %+v", rotated, want)
		}
		files := map[string]string{"A": "2\x00", "B": "1", "D": ""}
		s.wantFiles(in, files)
		s.restart(nil)
		s.wantSame(want)
		// The next daemon goes on from there.
		s.rotate(in.ID, runtime.Rotation{Generation: 4, SecretVersions: map[string]int64{"C": 2}, Files: []runtime.File{{Name: "C", Data: []byte("2")}}, Keep: []string{"B"}})
		s.wantFiles(in, map[string]string{"B": "1", "C": "2"})
		s.rotate(in.ID, runtime.Rotation{Generation: 5})
		s.wantFiles(in, nil)
		want.Generation, want.SecretVersions = 5, map[string]int64{"ENV": 7}
		want.GlobalSecrets = []string{"ENV"}
		s.wantSame(want)
		s.stop(in.ID)
	}},
	{"the first file may come as it runs", func(s *suite) {
		in := s.run(s.spec("a", 1))
		s.rotate(in.ID, runtime.Rotation{Generation: 2, SecretVersions: map[string]int64{"A": 1}, Files: []runtime.File{{Name: "A", Data: []byte("1")}}})
		s.wantFiles(in, map[string]string{"A": "1"})
	}},
	{"a rotation that was taken in is not repeated", func(s *suite) {
		in := s.run(s.spec("a", 1))
		s.rotate(in.ID, runtime.Rotation{Generation: 3, Files: someFiles("3")})
		for generation := range int64(4) {
			if got := s.rotate(in.ID, runtime.Rotation{Generation: generation, Files: someFiles("other")}); got.Generation != 3 {
				s.Errorf("after one to generation %d it has %d", generation, got.Generation)
			}
		}
		s.wantFiles(in, map[string]string{"A": "3", "B": "3", "C": "3"})
	}},
	{"only what runs takes in files", func(s *suite) {
		rotation := runtime.Rotation{Generation: 9, Files: someFiles("9")}
		want := func(id string, want error) {
			s.Helper()
			if _, err := s.r.Rotate(s.ctx, id, rotation); !errors.Is(err, want) {
				s.Errorf("Rotate(%s) = %v, want %v", id, err, want)
			}
		}
		want("never-000000000000", runtime.ErrNotFound)
		standby := s.prepare(s.spec("a", 1))
		want(standby.ID, runtime.ErrNotRunning)
		in := s.start(standby.ID, runtime.Launch{Generation: 1, Files: someFiles("1")})
		s.wantFiles(in, map[string]string{"A": "1", "B": "1", "C": "1"})
		s.stop(in.ID)
		want(in.ID, runtime.ErrNotRunning)
		s.remove(in.ID)
		want(in.ID, runtime.ErrNotFound)
	}},
	{"a rotation that is refused changes nothing", func(s *suite) {
		in := s.start(s.prepare(s.spec("a", 1)).ID, runtime.Launch{Generation: 1, Files: someFiles("1")})
		for _, files := range [][]runtime.File{{{Name: "../A"}}, {{Name: "A"}, {Name: "A"}}} {
			if _, err := s.r.Rotate(s.ctx, in.ID, runtime.Rotation{Generation: 2, Files: files}); err == nil {
				s.Errorf("files %v were taken in", files)
			}
		}
		s.wantFiles(in, map[string]string{"A": "1", "B": "1", "C": "1"})
		s.wantSame(in)
	}},
}
