V(128, 128, 128, 2, 2, false, true, 2), V(128, 128, 160, 2, 2, false, true, 2), V(64, 64, 128, 3, 3, false, true, 2),
    V(96, 96, 128, 2, 2, false, true, 2), V(192, 128, 128, 2, 2, false, false, 1),
    V(256, 256, 80, 2, 2, false, true, 1), V(128, 128, 128, 2, 2, true, true, 2), V(64, 64, 128, 2, 3, true, true, 2),
